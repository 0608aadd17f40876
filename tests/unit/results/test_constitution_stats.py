"""`align constitution stats` on a run whose every row is written here, so that each figure is known."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from align.__main__ import main
from align.constitution.loading import load_constitution
from align.engines.provenance import write_constitution
from align.feedback.records import Comparison, Critique, Revision
from align.records import Message, write_rows
from align.results.constitution_stats import Share, conflicts_between_tiers, principle_stats, read_run, run_agreement
from align.run.artefacts import Manifest, write_json
from align.settings.blocks import JudgeBlock, ModelBlock

PROMPT = (Message("user", "Hello?"),)
CONSTITUTION = """\
title: Two tiers
tiers: [first, second]
principles:
  - {id: asks, text: Ask., tier: first, rule: {ends_with: "?"}}
  - {id: calm, text: Be calm., tier: second, rule: {excludes: "!"}}
  - {id: short, text: Be short., tier: second, rule: {max_sentences: 1}}
"""


def critique(number: int, principle: str, text: str) -> Critique:
    return Critique(f"k{number}", "p", 1, principle, "c", text, "r", "stop")


def revision(number: int, principles: tuple[str, ...], accepted: bool, reason: str = "") -> Revision:
    return Revision(f"r{number}", "p", PROMPT, "o", "c", principles, 0.9 if accepted else 0.1, accepted, reason, "sft")


def comparison(number: int, p_a: float | None, **by_principle: float) -> Comparison:
    return Comparison(f"c{number}", "p", PROMPT, "a", "b", p_a, by_principle, judge="rule")


CRITIQUES = [
    critique(0, "asks", "It ends with a statement."),
    critique(1, "asks", "No changes are needed."),
    critique(2, "asks", ""),
    critique(3, "calm", "It has an exclamation mark."),
]
REVISIONS = [revision(0, ("asks",), True), revision(1, ("asks", "calm"), True)]
REJECTED = [
    revision(2, ("asks",), False, "judged worse"),
    revision(3, ("asks",), False, "copy"),
    revision(4, ("calm",), False, "tie"),
    revision(5, ("short",), False, "near-duplicate"),
]
COMPARISONS = [
    comparison(0, 0.9, asks=0.9, calm=0.1, short=0.5),
    comparison(1, 0.8, asks=0.9, calm=0.9, short=0.9),
    comparison(2, 0.2, asks=0.5, calm=0.1, short=0.1),
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "tiers.yaml").write_text(CONSTITUTION)
    folder = tmp_path / load_constitution(tmp_path / "tiers.yaml").key
    rows: dict[str, dict[str, list[Any]]] = {
        "revise": {"critiques": CRITIQUES, "revisions": REVISIONS, "rejected": REJECTED},
        "compare": {"comparisons": COMPARISONS},
    }
    settings = {
        "judge": JudgeBlock(kind="rule").model_dump(mode="json"),
        "model": ModelBlock(path="none").model_dump(mode="json"),
        "settings": {},
    }
    for stage, files in rows.items():
        (folder / stage).mkdir(parents=True)
        for name, some in files.items():
            write_rows(folder / stage / f"{name}.jsonl", some)
        write_json(folder / stage / "manifest.json", Manifest(stage, "f", settings, {}, {}).__dict__)
    return folder


def test_figures_by_principle_are_those_worked_by_hand(run: Path) -> None:
    found = {each.principle: each for each in principle_stats(read_run(run))}
    asks, calm, short = found["asks"], found["calm"], found["short"]
    assert (asks.drawn, calm.drawn, short.drawn) == (Share(3, 4), Share(1, 4), Share(0, 4))
    assert (asks.found_fault, calm.found_fault) == (Share(1, 2), Share(1, 1))
    assert (asks.accepted, calm.accepted) == (Share(2, 4), Share(1, 2))
    assert (asks.won, calm.won) == (Share(2, 3), Share(1.5, 2))
    # asks: against (0.1, 0.5) no, with (0.9, 0.9) yes; calm: against (0.9, 0.5) no, yes, yes with (0.5, 0.1).
    assert (asks.with_rest, calm.with_rest) == (Share(1, 2), Share(2, 3))
    # A near-duplicate won before the judge, and was not accepted.
    assert (short.accepted, short.won) == (Share(0, 1), Share(1, 1))
    assert short.found_fault.value is short.with_people.value is None


def test_a_win_counts_for_what_led_to_the_revision_and_for_one_that_came_twice(run: Path) -> None:
    rows = [
        replace(revision(0, ("asks", "calm"), True), revised_by=("calm",)),
        revision(1, ("calm",), False, "near-duplicate"),
        revision(2, ("calm",), False, "judged worse"),
    ]
    found = {each.principle: each for each in principle_stats(replace(read_run(run), revisions=rows))}
    assert (found["asks"].won, found["calm"].won) == (Share(0, 0), Share(2, 3))
    assert (found["asks"].accepted, found["calm"].accepted) == (Share(1, 1), Share(1, 3))


def test_a_preference_is_what_the_judge_calls_one(run: Path) -> None:
    rows = replace(read_run(run), comparisons=[comparison(0, None, asks=0.54, calm=0.9)])
    assert principle_stats(rows)[0].with_rest == Share(1, 1)
    assert principle_stats(replace(rows, judge=JudgeBlock(min_margin=0.05)))[0].with_rest == Share(0, 0)


def test_the_matrices_are_by_the_margins_of_the_judge_that_compared(run: Path) -> None:
    path = run / "compare/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["settings"]["judge"] = JudgeBlock(chain_of_thought=True, min_margin=0.05).model_dump(mode="json")
    write_json(path, manifest)
    rows = [comparison(0, None, asks=0.6, calm=0.4), comparison(1, None, asks=0.6, calm=0.54)]
    write_rows(run / "compare/comparisons.jsonl", rows)
    agreement = run_agreement(read_run(run))
    assert (agreement.decided[0][1], agreement.opposed[0][1]) == (1, 1)
    # The second is a tie to this judge: calm's 0.54 is within its margin.
    assert principle_stats(read_run(run))[0].with_rest == Share(0, 1)


def test_weights_decide_what_the_rest_prefers(run: Path) -> None:
    text = CONSTITUTION.replace('{ends_with: "?"}}', '{ends_with: "?"}, weight: 3}')
    (run.parent / "weighted.yaml").write_text(text)
    weighted = load_constitution(run.parent / "weighted.yaml")
    rows = read_run(run)
    one = [comparison(9, 0.5, asks=0.7, calm=0.1, short=0.9)]
    found = {each.principle: each for each in principle_stats(type(rows)(comparisons=one), weighted)}
    # Without short: asks 3 * 0.2 beside calm's -0.4 is above one half; with equal weights it would lie below.
    assert found["short"].with_rest == Share(1, 1)
    plain = {each.principle: each for each in principle_stats(type(rows)(comparisons=one))}
    assert plain["short"].with_rest == Share(0, 1)


def test_the_earlier_tier_wins_conflicts(run: Path) -> None:
    constitution = load_constitution(run.parent / "tiers.yaml")
    agreement = run_agreement(read_run(run), constitution)
    assert agreement.principles == ("asks", "calm", "short")
    assert conflicts_between_tiers(agreement, constitution) == Share(1, 1)


def test_the_command_shows_every_figure_and_a_dash_where_nothing_is_known(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["constitution", "stats", str(run), "--constitution", str(run.parent / "tiers.yaml")]) == 0
    shown = capsys.readouterr().out
    assert "3 of 4" in shown and "–" in shown
    assert "the earlier tier's principle won 1 of 1" in shown
    assert "--human FILE" in shown


def test_the_weights_are_those_of_the_constitution_that_the_run_keeps(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["constitution", "stats", str(run)]) == 0
    assert "Every weight counts as 1" in capsys.readouterr().out
    write_constitution(run / "compare", load_constitution(run.parent / "tiers.yaml"))
    assert main(["constitution", "stats", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "Every weight counts as 1" not in shown
    assert "the earlier tier's principle won 1 of 1" in shown


def test_human_pairs_are_not_judged_by_a_kept_constitution_without_its_documents(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run.parent / "facts").mkdir()
    (run.parent / "facts" / "house.txt").write_text("It opened in 1987.")
    (run.parent / "tiers.yaml").write_text(CONSTITUTION + "sources: [facts]\n")
    write_constitution(run / "compare", load_constitution(run.parent / "tiers.yaml"))
    (run.parent / "people.jsonl").write_text('{"prompt": "One", "chosen": "Is it?", "rejected": "It is."}\n')
    assert main(["constitution", "stats", str(run), "--human", str(run.parent / "people.jsonl")]) == 2
    assert "name it with --constitution FILE" in capsys.readouterr().err


def test_human_pairs_are_judged_by_the_run_s_judge(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    people = run.parent / "people.jsonl"
    rows = [
        {"prompt": "One", "chosen": "Is it?", "rejected": "It is."},
        {"prompt": "Two", "chosen": "Was it?", "rejected": "It was!"},
        {"prompt": "Three", "chosen": "It is.", "rejected": "Is it so?"},
    ]
    people.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--constitution", str(run.parent / "tiers.yaml"), "--human", str(people)]
    assert main(["constitution", "stats", str(run), *arguments]) == 0
    shown = capsys.readouterr().out
    assert "2 of 3" in shown  # asks
    assert "100%" in shown and "1 of 1" in shown  # calm


def test_a_folder_without_rows_and_another_run_s_constitution_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["constitution", "stats", str(tmp_path)]) == 2
    assert "neither `revise` nor `compare`" in capsys.readouterr().err
    (tmp_path / "other.yaml").write_text(CONSTITUTION.replace("Ask.", "Ask!"))
    assert main(["constitution", "stats", str(run), "--constitution", str(tmp_path / "other.yaml")]) == 2
    assert "name the run's own" in capsys.readouterr().err
