"""The files of a recipe's data are checked when it is read, and make its stages stale when they change."""

from pathlib import Path

import pytest

from align.errors import InputError
from align.pipeline.plan import make_plan, stage_slice
from align.pipeline.recipe import Recipe, load_recipe

ROW = '{"prompt": "p", "completion": "c"}\n'


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl", "c.csv"):
        Path(name).write_text(ROW)


def recipe(path: str, more: str = "") -> Recipe:
    Path("recipe.yaml").write_text(
        f"model: {{path: 'wheel:none'}}\nsft: {{revisions: false, helpful: {{sources: [{{path: {path}{more}}}]}}}}\n"
    )
    return load_recipe("recipe.yaml", ["model.path=org/name"])


def test_every_file_of_a_list_or_pattern_counts() -> None:
    read = stage_slice(recipe("['*.jsonl', c.csv]"), "sft")["files"]

    assert read.keys() == {"a.jsonl", "b.jsonl", "c.csv"}
    Path("b.jsonl").write_text(ROW * 2)
    changed = stage_slice(recipe("['*.jsonl', c.csv]"), "sft")["files"]
    assert [name for name in read if read[name] != changed[name]] == ["b.jsonl"]


def test_a_saved_folder_counts_by_its_content() -> None:
    import datasets

    found = []
    for answer in ("c", "d"):
        datasets.Dataset.from_list([{"prompt": "p", "completion": answer}]).save_to_disk("saved")
        found.append(stage_slice(recipe("saved"), "sft")["files"]["saved"])

    assert found[0] != found[1]
    assert make_plan(recipe("saved"))["sft"].state == "missing"


@pytest.mark.parametrize(
    ("path", "fault"),
    [
        ("[a.jsonl, none.jsonl]", "none.jsonl: no such file"),
        ("'none*.jsonl'", r"none\*\.jsonl: no file matches this pattern"),
        ("./a.docx", "a.docx: no such file"),
        ("x" * 5000 + ".jsonl", "longer than a file's path can be"),
        ("[]", "path"),
    ],
)
def test_files_that_are_not_there_are_faults_of_the_recipe(path: str, fault: str) -> None:
    with pytest.raises(InputError, match=fault):
        recipe(path)


def test_settings_that_would_have_no_effect_are_faults() -> None:
    with pytest.raises(InputError, match=r"sft\.helpful\.sources\[0\]\.margin_scale: makes pairs"):
        recipe("a.jsonl", ", margin_scale: 1")
    Path("prompts.yaml").write_text(
        "model: {path: org/name}\n"
        "prompts: {cut: end, sources: [{path: a.jsonl}], split: {sft: 1, preference: 0, rl: 0, eval: 0}}\n"
        "sample: {engine: {kind: openai, model: m}}\n"
    )
    with pytest.raises(InputError, match=r"prompts\.cut: a server does not say"):
        load_recipe("prompts.yaml")
    with pytest.raises(InputError, match="name the prompt there"):
        load_recipe("prompts.yaml", ["prompts.sources=[{path: a.jsonl, column: x, columns: {prompt: y}}]"])
    with pytest.raises(InputError, match="columns"):
        recipe("a.jsonl", ", columns: {answr: x}")
