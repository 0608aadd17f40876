"""`align constitution diff` on the command line with a rule judge: only the labels that should flip do."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scripted_engine import ScriptedEngine

from align.__main__ import main
from align.constitution.constitution import Constitution
from align.constitution.loading import load_constitution
from align.constitution.principles import Principle
from align.constitution.text_diff import text_changes, word_diff
from align.feedback.agreement import Label
from align.feedback.records import Comparison
from align.records import Message, write_rows
from align.results.constitution_diff import placebo_of
from align.results.judged_pairs import Pair, drawn_pairs, judge_from_options, pairs_of, preference_pairs
from align.results.label_diff import label_movement, largest_changes, moved_beyond, principle_pulls, shared_principles
from align.run.artefacts import Manifest, write_json
from align.settings.blocks import JudgeBlock, ModelBlock

CONSTITUTIONS = Path(__file__).parents[3] / "constitutions"
ASKING, TELLING = CONSTITUTIONS / "style-asking.yaml", CONSTITUTIONS / "style-telling.yaml"
PROMPT = (Message("user", "Hello?"),)


def pair(name: str, prompt_id: str = "", a: str = "a", b: str = "b") -> Pair:
    return Pair(name, prompt_id or name, PROMPT, a, b)


def label(p_a: float | None, **by_principle: float) -> Label:
    return Label(p_a, by_principle)


def write_run(folder: Path, texts: list[tuple[str, str]]) -> Path:
    """A run whose compare judged these pairs, by rule."""
    compare = folder / "compare"
    compare.mkdir(parents=True)
    rows = [Comparison(f"c{n}", f"p{n}", PROMPT, a, b, p_a=0.9, judge="rule") for n, (a, b) in enumerate(texts)]
    unjudged = replace(rows[0], id="cut", p_a=None, reason="cut", judge="")
    write_rows(compare / "comparisons.jsonl", [*rows, unjudged])
    settings = {
        "judge": JudgeBlock(kind="rule").model_dump(mode="json"),
        "model": ModelBlock(path="none").model_dump(mode="json"),
        "settings": {"principle": "all"},
    }
    write_json(compare / "manifest.json", Manifest("compare", "f", settings, {}, {}).__dict__)
    return folder


def diff(tmp_path: Path, *arguments: object) -> dict[str, Any]:
    target = tmp_path / "diff.json"
    assert main(["constitution", "diff", *map(str, arguments), "--json", str(target)]) == 0
    found: dict[str, Any] = json.loads(target.read_text())
    return found


def test_the_opposite_flips_labels_while_paraphrase_and_placebo_do_not(tmp_path: Path) -> None:
    found = diff(tmp_path, ASKING, TELLING)
    moved = found["moved"]
    assert moved["B"]["flipped"]["mean"] == 1.0
    assert moved["B"]["pairs"] == 48
    # Telling's hard rule leaves undecided what is short on both sides, as two thirds of asking's probes are.
    assert moved["B"]["both"] == 24 + 8
    assert moved["A in other words"]["flipped"]["mean"] == moved["A in other words"]["change"]["mean"] == 0.0
    assert moved["placebo"]["other"] == 0  # ties on every pair
    assert moved["placebo"]["flipped"] is None
    assert found["beyond_null"] is True
    assert len(found["largest"]) == 10


def test_a_run_s_pairs_are_judged_by_the_run_s_judge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Of three sentences each, as telling's hard rule wants them.
    endings = [("Is it?", "It is!"), ("So it is.", "Is it so?"), ("It is.", "It was.")]
    run = write_run(tmp_path / "run", [(f"Well. So. {a}", f"Well. So. {b}") for a, b in endings])
    found = diff(tmp_path, ASKING, TELLING, "--pairs", run)
    assert found["judge"] == "rule"
    assert found["moved"]["B"]["pairs"] == 3
    assert found["moved"]["B"]["both"] == 2
    assert found["moved"]["B"]["flipped"]["mean"] == 1.0
    assert "3 pairs" in capsys.readouterr().out


def test_a_constitution_beside_itself_differs_in_nothing(tmp_path: Path) -> None:
    found = diff(tmp_path, ASKING, ASKING)
    assert found["texts"] == found["largest"] == []
    assert found["moved"]["B"]["change"]["mean"] == 0.0
    assert found["beyond_null"] is False


def test_no_verdict_is_given_where_no_pair_is_decided(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", [("Well. So. It is.", "Well. So. It was.")])

    assert diff(tmp_path, ASKING, TELLING, "--pairs", run)["beyond_null"] is None
    assert "cannot be said" in " ".join(capsys.readouterr().out.split())


def test_a_principle_for_some_prompts_judges_its_own_probes(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(
        "title: T\nprinciples:\n  - {id: asks, text: Ask., applies: [talk], rule: {ends_with: '?'},\n"
        "     probes: [{prompt: Hi, better: 'Yes?', worse: No.}]}\n"
    )
    moved = diff(tmp_path, path, path)["moved"]["B"]

    assert (moved["pairs"], moved["both"]) == (1, 1)


def test_drawing_one_principle_adds_another_seed_to_the_null_band(tmp_path: Path) -> None:
    found = diff(tmp_path, ASKING, TELLING, "--draw")
    # Each probe is decided by one principle of three, so another draw decides other pairs.
    assert found["moved"]["A with another seed"]["change"]["mean"] > 0
    assert found["moved"]["A with another seed"]["both"] < 48


class Thinking(ScriptedEngine):
    """Thinks what its seed says, and chooses the letter that it thought of."""

    def __init__(self) -> None:
        super().__init__(
            lambda request: f"The better one is {'AB'[request.seed % 2]}.",
            lambda request, choice: 0.0 if f"is {choice}." in request.messages[-2].content else -3.0,
        )


def test_a_judge_that_thinks_is_asked_again_with_another_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", [(f"It is {n}.", f"Is it {n}?") for n in range(12)])
    manifest = json.loads((run / "compare/manifest.json").read_text())
    manifest["settings"]["judge"] = JudgeBlock(kind="choice", chain_of_thought=True).model_dump(mode="json")
    write_json(run / "compare/manifest.json", manifest)
    monkeypatch.setattr("align.engines.open.open_engine", lambda engine, model: Thinking())
    moved = diff(tmp_path, ASKING, TELLING, "--pairs", run)["moved"]

    assert moved["A with another seed"]["change"]["mean"] > 0
    assert "samples nothing" not in capsys.readouterr().out


def test_the_shipped_placebo_stands_beside_a_constitution_that_lies_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(ASKING.read_text())
    monkeypatch.chdir(CONSTITUTIONS.parent)
    assert diff(tmp_path, own, TELLING)["constitutions"]["placebo"].startswith("placebo-")
    assert placebo_of(CONSTITUTIONS / "placebo.yaml") is None
    monkeypatch.chdir(tmp_path)
    diff(tmp_path, own, TELLING)
    assert "No placebo: name a constitution" in capsys.readouterr().out


def test_the_page_escapes_what_completions_hold(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [("<script>alert(1)</script>?", "No!")])
    page = tmp_path / "diff.html"
    assert main(["constitution", "diff", str(ASKING), str(TELLING), "--pairs", str(run), "--html", str(page)]) == 0
    assert "<script" not in page.read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;?" in page.read_text()


def test_faults_are_told_with_a_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    honesty = CONSTITUTIONS / "honesty.yaml"
    for arguments, told in (
        ((ASKING, honesty), "needs a principle with a `rule`"),
        ((ASKING, TELLING, "--judge", "contrast"), "--judge-model"),
        ((ASKING, TELLING, "--pairs", tmp_path), "no compare/comparisons.jsonl"),
        ((ASKING, TELLING, "--html", tmp_path / "none" / "x.html"), "--html"),
        ((ASKING, TELLING, "--json", tmp_path / "none" / "x.json"), "--json"),
    ):
        assert main(["constitution", "diff", *map(str, arguments)]) == 2
        assert told in capsys.readouterr().err


def test_text_changes_tell_added_removed_renamed_and_changed_principles() -> None:
    def made(*principles: dict[str, Any], **content: Any) -> Constitution:
        parts = tuple(Principle.model_validate(each) for each in principles)
        return Constitution(id="test", title="T", principles=parts, **content)

    kept = {"id": "calm", "text": "Be calm and kind.", "tier": "one"}
    a = made(kept, {"id": "old", "text": "Ask."}, {"id": "gone", "text": "Go."}, tiers=("one", "two"))
    b = made(
        {**kept, "text": "Be calm and brief.", "weight": 2, "tier": "two"},
        {"id": "new", "text": "Ask."},
        {"id": "come", "text": "Come."},
        tiers=("two", "one"),
    )
    found = {(each.change, each.principle, each.key): each.text for each in text_changes(a, b)}
    assert found == {
        ("changed", "", "tiers"): "[-one-]{+two+} > [-two-]{+one+}",
        ("changed", "calm", "text"): "Be calm and [-kind-]{+brief+}.",
        ("changed", "calm", "tier"): "[-one-]{+two+}",
        ("changed", "calm", "weight"): "[-1-]{+2+}",
        ("renamed", "new", "id"): "[-old-]{+new+}",
        ("removed", "gone", "text"): "[-Go.-]",
        ("added", "come", "text"): "{+Come.+}",
    }
    assert text_changes(a, a) == []


def test_documents_differ_by_what_they_say_and_not_by_where_they_lie(tmp_path: Path) -> None:
    for place in ("here", "there"):
        (tmp_path / place / "facts").mkdir(parents=True)
        (tmp_path / place / "facts/a.txt").write_text("One.")
        text = "title: x\nsources: facts\nprinciples: [{id: p, text: a}]\n"
        (tmp_path / place / "c.yaml").write_text(text)
    here = load_constitution(tmp_path / "here/c.yaml")
    assert text_changes(here, load_constitution(tmp_path / "there/c.yaml")) == []
    (tmp_path / "there/facts/a.txt").write_text("Two.")
    there = load_constitution(tmp_path / "there/c.yaml")
    (before,), (after,) = here.documents.values(), there.documents.values()
    found = text_changes(here, there)
    assert [(each.principle, each.key) for each in found] == [("", "sources"), ("p", "sources")]
    assert {each.text for each in found} == {f"facts [-{before[:8]}-]{{+{after[:8]}+}}"}


def test_a_word_diff_holds_both_texts() -> None:
    old, new = "Never tell a lie, please.", "Please never tell lies."
    shown = word_diff(old, new)
    assert re.sub(r"\[-.*?-\]", "", shown).replace("{+", "").replace("+}", "") == new
    assert re.sub(r"\{\+.*?\+\}", "", shown).replace("[-", "").replace("-]", "") == old


def test_movement_is_what_counting_by_hand_gives() -> None:
    pairs = [pair(name) for name in "vwxyz"]
    one = [label(0.9), label(0.2), label(None), label(0.7), label(None)]
    other = [label(0.1), label(0.3), label(0.8), label(None), label(None)]
    found = label_movement(pairs, one, other)
    assert (found.pairs, found.one, found.other, found.both) == (5, 3, 3, 2)
    assert found.flipped is not None and found.flipped.mean == 0.5
    assert found.change.mean == pytest.approx((0.8 + 0.1 + 0.3 + 0.2 + 0) / 5)
    assert label_movement(pairs, other, one).flipped == found.flipped
    assert largest_changes(one, other, 10) == [0, 2, 3, 1]
    assert largest_changes(one, other, 2) == [0, 2]


def test_few_flips_are_not_beyond_a_null_with_few_pairs() -> None:
    pairs = [pair(name) for name in "xy"]
    flipped = label_movement(pairs, [label(0.9), label(0.9)], [label(0.1), label(0.1)])
    still = label_movement(pairs, [label(0.9), label(0.9)], [label(0.9), label(0.9)])
    assert not moved_beyond(flipped, still)


def test_pulls_say_which_principles_side_with_which_label_where_they_flip() -> None:
    one = [label(0.9, asks=0.9, calm=0.5), label(0.8, asks=0.3, calm=0.9)]
    other = [label(0.1, tells=0.1), label(0.9, tells=0.8)]
    found = {(each.owner, each.principle): each for each in principle_pulls(one, other)}
    asks, calm, tells = found["A", "asks"], found["A", "calm"], found["B", "tells"]
    assert (asks.decided, asks.with_a, asks.with_b, asks.to_a, asks.to_b) == (2, 0.5, 0.0, 1, 0)
    assert (calm.decided, calm.with_a, calm.with_b, calm.to_a, calm.to_b) == (1, 1.0, 1.0, 0, 0)
    assert (tells.with_a, tells.with_b, tells.to_a, tells.to_b) == (0.5, 1.0, 0, 1)


def test_principles_of_one_id_are_compared_alone() -> None:
    pairs = [pair("x"), pair("y")]
    one, other = [label(0.9, calm=0.9), label(0.9)], [label(0.9, calm=0.2), label(0.9, calm=0.9)]
    (calm,) = shared_principles(pairs, one, other)
    assert (calm.movement.pairs, calm.movement.both) == (1, 1)
    assert calm.movement.flipped is not None and calm.movement.flipped.mean == 1.0


def test_preferences_stand_in_either_place_and_keep_who_was_preferred(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"Question {n}", "chosen": "good", "rejected": "bad"} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = preference_pairs(path)
    assert all((each.a == "good") == each.a_preferred for each in found)
    assert 8 < sum(bool(each.a_preferred) for each in found) < 32
    assert pairs_of(path) == found
    fewer, more = drawn_pairs(found, 5), drawn_pairs(found, 9)
    assert len(fewer) == 5 and set(each.id for each in fewer) < set(each.id for each in more)


def test_a_named_model_judges_by_contrast_where_no_kind_is_named() -> None:
    assert judge_from_options(None, None, None).block.kind == "rule"
    assert judge_from_options(None, "some/model", None).block.kind == "contrast"
    assert judge_from_options("choice", "some/model", None).block.engine.model == "some/model"


def test_the_placebo_s_rules_hold_for_every_ordinary_completion() -> None:
    placebo = load_constitution(CONSTITUTIONS / "placebo.yaml")
    for principle in load_constitution(ASKING).principles:
        for probe in principle.probes:
            assert all(each.keeps_rule(text) for each in placebo.principles for text in (probe.better, probe.worse))
