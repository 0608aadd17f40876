"""`align data check` on a small file of each layout, and on rows that a stage would leave out."""

import copy
import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from align.__main__ import main
from align.cli.data_check import sheets
from align.data.checking import check_source, percentiles
from align.settings.data import PairSource
from tests.unit.data.layout_rows import BAD, DEMONSTRATIONS, EVERY, GOOD, PAIRS, QUESTION
from tests.unit.data.pair_files import write


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tests.tiny import build_tokenizer

    return build_tokenizer()


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = main(["data", "check", *words])
    return code, re.sub(r"\s+", " ", capsys.readouterr().out)


@pytest.mark.parametrize("name", EVERY)
def test_each_layout_is_recognised_and_rendered(tmp_path: Path, tokenizer: Any, name: str) -> None:
    check = check_source(write(tmp_path / "rows.jsonl", *EVERY[name]), tokenizer=tokenizer)

    kind = "pairs" if name in PAIRS else "demonstrations" if name in DEMONSTRATIONS else "prompts"
    assert (check.kind, dict(check.layouts), check.records) == (kind, {name: len(EVERY[name])}, 1)
    assert (check.problems, sum(check.left_out.values())) == ([], 0)
    prompt, *answers = check.examples[0].parts
    opening = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], tokenize=False, add_generation_prompt=True
    )
    assert (prompt.text, prompt.counts) == (opening, False)
    expected = {"pairs": [GOOD, BAD], "demonstrations": [GOOD], "prompts": []}[kind]
    assert [(part.text, part.counts) for part in answers] == [(f"{text}<|im_end|>", True) for text in expected]
    length = len(tokenizer(opening, add_special_tokens=False)["input_ids"])
    assert check.lengths["prompt"] == [length]


@pytest.mark.parametrize("name", EVERY)
def test_the_command_reads_each_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    code, text = shown(capsys, write(tmp_path / "rows.jsonl", *EVERY[name]).path)

    assert code == 0
    assert QUESTION in text and name.split(" ")[0] in text


def test_the_command_says_what_would_be_left_out_and_that_a_stage_would_stop(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_model_dir: Path
) -> None:
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "same", "chosen": "b", "rejected": "b"},
        {"prompt": "long", "chosen": "word " * 200, "rejected": "c"},
        {"prompt": "none", "chosen": 3, "rejected": "c"},
    ]
    path = write(tmp_path / "rows.jsonl", *rows).path
    words = [path, "--model", str(tiny_model_dir), "--max-length", "100"]
    code, text = shown(capsys, *words)

    assert code == 2
    for outcome in (
        "used as pairs │ 1",
        "left out: unusable │ 1",
        "left out: chosen = rejected │ 1",
        "left out: longer than 100 tokens │ 1",
        "repeated (used once) │ 1",
        "cut │ 0",
    ):
        assert outcome in text
    assert "line 5: `chosen` must be a text" in text
    assert "1 of 5 rows are unusable" in text
    assert shown(capsys, *words, "--set", "max_unusable=0.2")[0] == 0


def test_settings_of_the_source_are_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"ask": "Hi?", "good": "Yes.", "bad": "No.", "margin": 2}
    path = write(tmp_path / "rows.jsonl", row).path
    columns = [
        f"columns.{name}={column}" for name, column in {"prompt": "ask", "chosen": "good", "rejected": "bad"}.items()
    ]
    words = [word for setting in [*columns, "columns.margin=margin", "margin_scale=1"] for word in ("--set", setting)]

    assert shown(capsys, path)[0] == 2
    code, text = shown(capsys, path, *words)
    assert (code, "p(chosen is better) = 0.881" in text) == (0, True)
    assert main(["data", "check", path, "--set", "colums.prompt=ask"]) == 2


def test_a_recipe_gives_the_model_and_the_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_model_dir: Path
) -> None:
    path = write(tmp_path / "rows.jsonl", {"prompt": "a", "completion": "b"}).path
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{path: {tiny_model_dir}}}\n"
        f"sft: {{revisions: false, max_length: 77, helpful: {{sources: [{{path: {path}}}]}}}}\n"
    )
    code, text = shown(capsys, path, "--recipe", str(recipe), "--as", "demonstrations")

    assert (code, "longer than 77 tokens" in text, "Lengths in tokens" in text) == (0, True, True)


def test_a_row_that_the_template_refuses_is_named(tmp_path: Path, tokenizer: Any) -> None:
    strict = copy.deepcopy(tokenizer)
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    strict.chat_template = refusal + tokenizer.chat_template
    rows = [{"prompt": "a", "completion": "b"}, {"system": "s", "prompt": "a", "completion": "b"}]
    check = check_source(write(tmp_path / "rows.jsonl", *rows), tokenizer=strict)

    ((refused,),) = check.faults.values()
    assert refused.place.endswith("rows.jsonl, line 2")
    assert "no system" in refused.why


def test_tables_are_read_as_json_lines_are(tmp_path: Path) -> None:
    rows = [
        {"instruction": "1984", "input": "", "output": "None"},
        {"instruction": "a,\nb", "input": "007", "output": "NA"},
    ]
    for name, separator in (("rows.csv", ","), ("rows.tsv", "\t")):
        with (tmp_path / name).open("w", newline="") as out:
            table = csv.DictWriter(out, rows[0].keys(), delimiter=separator)
            table.writeheader()
            table.writerows(rows)
    checks = [check_source(PairSource(path=str(tmp_path / name))) for name in ("rows.csv", "rows.tsv")]
    plain = check_source(write(tmp_path / "rows.jsonl", *rows))

    for check in checks:
        assert (check.lengths, check.layouts) == (plain.lengths, plain.layouts)
        assert [each.parts for each in check.examples] == [each.parts for each in plain.examples]


def test_percentiles_are_of_the_nearest_rank() -> None:
    lengths: Sequence[int] = list(range(1, 102))

    assert percentiles(lengths[::-1], [0, 0.5, 0.95, 1]) == [1, 51, 96, 101]


def test_a_report_has_a_table_for_each_question(tmp_path: Path) -> None:
    check = check_source(write(tmp_path / "rows.jsonl", *PAIRS["hh-rlhf"]))

    assert [sheet.title for sheet in sheets(check, None, in_tokens=False)] == [
        "Recognised as",
        "What becomes of them",
        "Lengths in characters",
    ]
    assert json.dumps(check.other_counts) == "{}"
