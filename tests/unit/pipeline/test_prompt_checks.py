"""Faults that a stage would only find as it runs are reported when the recipe is read."""

import os
from pathlib import Path

import pytest

from align.errors import InputError
from align.pipeline.recipe import load_recipe
from tests.unit.pipeline.test_recipe import CONSTITUTION, RECIPE, faults, write

PROBE = "      - {prompt: Why?, better: So., worse: So!}\n"
ALL_SFT = "prompts.split={sft: 1, preference: 0, rl: 0, eval: 0}"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(CONSTITUTION, "small.yaml")
    write('{"prompt": "Why?", "category": "weapons"}\n', "prompts.jsonl")
    write(RECIPE)


@pytest.mark.parametrize("seed", [2**63, 2**64, 10**30])
def test_a_seed_that_no_generator_takes_is_refused(seed: int) -> None:
    assert faults("recipe.yaml", f"seed={seed}")[1] == f"--set seed: must be below {2**63}, got {seed}"
    assert load_recipe("recipe.yaml", [f"seed={2**63 - 1}"]).seed == 2**63 - 1


@pytest.mark.parametrize(("line", "key"), [("1: 2", "1"), ("true: 2", "true"), ("dpo: {1: 2}", "dpo.1")])
def test_a_key_that_is_not_text_is_an_unknown_key(line: str, key: str) -> None:
    said = faults(write(RECIPE + line + "\n"))
    assert said[0] == "recipe.yaml: 1 problem"
    assert f"{key}: no such setting; there are: " in said[1]


def test_a_recipe_without_stages_is_refused() -> None:
    assert faults(write("seed: 1\n"))[1].startswith("has no stage to run; add one: compare, dpo")
    assert "no stage" not in "\n".join(faults(write("dpo: {bta: 1}\n")))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("small.yaml", "it is a file; give the folder that `save_pretrained` wrote"),
        ("empty", "the folder has no config.json"),
        ("wheel:no-such-package", "no such Python package is installed; install it with `pip install no-such-package`"),
        ("wheel:pytest", "the package contains 0 .gguf files"),
    ],
)
def test_a_path_without_a_model_is_reported_for_every_key_that_names_a_model(path: str, message: str) -> None:
    Path("empty").mkdir()
    for key in ("model.path", "judge.engine.model"):
        [_, said] = faults("recipe.yaml", f"{key}={path}")
        assert said.startswith(f"--set {key}: {path}: {message}")


def test_a_folder_or_a_pipe_is_refused_as_a_source_of_prompts() -> None:
    Path("folder.jsonl").mkdir()
    os.mkfifo("pipe.jsonl")
    for path, message in {"folder.jsonl": "is a folder", "pipe.jsonl": "is a pipe", "small.yaml": "this kind"}.items():
        [_, said] = faults("recipe.yaml", f"prompts.sources.0.path={path}")
        assert said.startswith(f"--set prompts.sources[0].path: {path}: ") and message in said


@pytest.mark.parametrize(("probes", "enough"), [(0, False), (3, False), (4, True)])
def test_a_judge_with_too_few_probes_to_exclude_chance_is_refused(probes: int, enough: bool) -> None:
    write(CONSTITUTION + ("    probes:\n" + PROBE * probes if probes else ""), "small.yaml")
    if enough:
        assert load_recipe("recipe.yaml", ["judge.kind=choice"])
        return
    assert f"has too few probes for that ({probes})" in faults("recipe.yaml", "judge.kind=choice")[1]
    assert load_recipe("recipe.yaml", ["judge.kind=choice", "judge.allow_chance=true"])


def test_the_least_number_of_probes_is_the_one_from_which_the_interval_excludes_chance() -> None:
    from align.feedback.probes import LEAST_PROBES
    from align.figures.statistics import wilson_interval

    assert [wilson_interval(n, n)[0] > 0.5 for n in (LEAST_PROBES - 1, LEAST_PROBES)] == [False, True]


def test_a_split_that_a_stage_reads_and_no_prompt_can_belong_to_is_reported() -> None:
    said = faults("recipe.yaml", ALL_SFT)
    assert said[1].startswith("--set prompts.split.preference: `compare` reads this split, but no prompt can belong")
    assert len(said) == 2
    write('{"prompt": "Why?", "split": "preference"}\n', "prompts.jsonl")
    assert load_recipe("recipe.yaml", [ALL_SFT]), "the row says itself where it belongs"


def test_splits_are_not_checked_for_a_hub_dataset() -> None:
    assert load_recipe("recipe.yaml", [ALL_SFT, "prompts.sources.0.path=org/prompts"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["sample.splits=[rl]"],
            "revise.splits: no prompt of the split 'sft' is completed; add it to",
        ),
        (["revise.splits=[preference]"], "sft.revisions: no sample of the split 'sft' is revised"),
        (["compare.revision_pairs=true"], "compare.revision_pairs: no sample of the split 'preference' is revised"),
    ],
)
def test_splits_that_do_not_reach_the_next_stage_are_reported(overrides: list[str], message: str) -> None:
    assert any(message in line for line in faults("recipe.yaml", *overrides))


@pytest.mark.parametrize(
    ("applies", "is_refused"),
    [("wepons", True), ("weapons", False), ("gardening", False), ("weapons, wepons", False)],
)
def test_a_misspelling_of_a_category_of_the_prompts_is_reported(applies: str, is_refused: bool) -> None:
    write(CONSTITUTION + f"    applies: [{applies}]\n", "small.yaml")
    if is_refused:
        fault = "principle 'calm' applies to 'wepons', a category that no prompt has; did you mean `weapons`?"
        assert faults("recipe.yaml")[1] == f"line 5  constitution: {fault}"
    else:
        assert load_recipe("recipe.yaml")


def test_categories_are_not_checked_for_a_hub_dataset() -> None:
    write(CONSTITUTION + "    applies: [wepons]\n", "small.yaml")
    assert load_recipe("recipe.yaml", ["prompts.sources=[{path: prompts.jsonl}, {path: org/prompts}]"])


def test_the_command_that_a_plan_prints_can_be_pasted(capsys: pytest.CaptureFixture[str]) -> None:
    import shlex

    from align.__main__ import main

    Path("my recipe.yaml").write_text(RECIPE)
    override = 'model.system_prompt=it\'s a "test"'
    assert main(["plan", "my recipe.yaml", "--set", override]) == 0
    [following] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Next: ")]
    words = shlex.split(following.removeprefix("Next: "))
    assert words == ["align", "run", "sample", "--recipe", "my recipe.yaml", "--set", override]


def test_missing_inputs_are_reported_with_a_command_that_can_be_pasted() -> None:
    from align.pipeline.runner import run_stage

    with pytest.raises(InputError, match=r"`align run recipe.yaml --set 'sample.sampling.top_p= 0.5'`"):
        run_stage(load_recipe("recipe.yaml", ["sample.sampling.top_p= 0.5"]), "revise")
