"""The shipped constitution with documents, through sample and revise, with a scripted engine."""

import json
from pathlib import Path

import pytest

from align.constitution.loading import load_constitution
from align.engines.engine import ChoiceRequest, Request
from align.feedback.records import Critique
from align.settings.blocks import JudgeBlock
from align.stages.revise import STAGE as REVISE
from align.stages.revise import ReviseBlock
from align.stages.sample import STAGE as SAMPLE
from align.stages.sample import SampleBlock
from tests.stages.test_sample_revise_compare import World, scripted

GROUNDED = Path(__file__).parents[2] / "constitutions/grounded.yaml"


def reads(request: ChoiceRequest, choice: str) -> float:
    """A judge that prefers what the passages that it was shown support."""
    shown, _, asked = request.messages[-1].content.rpartition("Here is a conversation")
    first, second = asked.split("(A) ")[1].split("\n\n(B) ")
    ahead = _supported(first, shown) - _supported(second.split("\n\nWhich")[0], shown)
    return 2.0 * ahead * (1 if choice == "A" else -1) - 3.0


def _supported(text: str, shown: str) -> float:
    words = [word.strip(".,;") for word in text.split()]
    known = "papers" in text or all(word in shown for word in words if word[:1].isdigit() or word in {"Holm", "Falk"})
    return float(known and "!" not in text)


@pytest.fixture
def world(tmp_path: Path) -> World:
    prompts = tmp_path / "prompts.jsonl"
    rows = [
        {
            "prompt": f"How many films may I borrow from the library in week {number}?",
            "category": category,
            "split": "sft",
        }
        for number in range(6)
        for category in ("facts", "other")
    ]
    prompts.write_text("\n".join(json.dumps(row) for row in rows))
    made = World(tmp_path, prompts)
    made.shared["constitution"] = str(GROUNDED)
    made.shared["judge"] = JudgeBlock(kind="choice", allow_chance=True)
    return made


def answer(request: Request) -> str:
    asked = request.messages[-1].content
    if "Rewrite" in asked:
        return "You may borrow up to 15 items at a time."
    if len(request.messages) > 1:
        return "The limit is 15 items [lending.md#2], as [lending.md#77] says too."
    return "You may borrow 999 films!"


def test_critiques_cite_the_passages_and_made_up_ids_are_counted(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, answer, reads)
    world.run(SAMPLE, SampleBlock())
    outcome = world.run(REVISE, ReviseBlock(examples=1))

    rows = world.rows("revise/critiques.jsonl", Critique)
    shown = [row for row in rows if row.evidence]
    assert {row.principle_id for row in shown} <= {"keeps-to-documents", "says-what-is-unknown"}
    assert {row.principle_id for row in rows if not row.evidence} <= {"calm"}
    assert all("lending.md#2" in row.evidence and row.cited == ("lending.md#2", "lending.md#77") for row in shown)
    used = outcome.figures["evidence"]
    calm = len(rows) - len(shown)
    assert used == {
        "critiques_shown_passages": len(shown),
        "critiques_that_cite": len(shown),
        "citations": 2 * len(rows),
        "made_up_citations": len(shown) + 2 * calm,
    }
    assert outcome.counts["accepted"] > 0


def test_principles_apply_to_their_categories_from_prompts_to_critiques(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "c.yaml").write_text(
        f"title: x\nextends: {GROUNDED}\ninclude: [documents]\nprinciples:\n"
        "  - {id: other, text: Be brief., applies: [other], rule: {max_words: 99}}\n"
        "  - {id: facts, text: Be exact., applies: [facts], rule: {max_words: 99}, weight: 1000}\n"
    )
    world.shared["constitution"] = str(tmp_path / "c.yaml")
    scripted(monkeypatch, answer, reads)
    world.run(SAMPLE, SampleBlock())
    world.run(REVISE, ReviseBlock(rounds=2))

    categories = {
        row["prompt_id"]: row["category"]
        for line in (world.root / "sample/samples.jsonl").read_text().splitlines()
        for row in [json.loads(line)]
    }
    drawn = {(categories[row.prompt_id], row.principle_id) for row in world.rows("revise/critiques.jsonl", Critique)}
    assert ("facts", "facts") in drawn
    assert drawn <= {(c, p) for c in ("facts", "other") for p in ("keeps-to-documents", c)}


def test_the_shipped_documents_answer_each_probe_about_a_fact() -> None:
    from align.feedback.evidence import PromptContext

    constitution = load_constitution(GROUNDED)
    principle = constitution.principle("keeps-to-documents")
    for probe in principle.probes:
        shown = " ".join(each.text for each in PromptContext(constitution).passages(principle, [probe.prompt]))
        numbers = [word.strip(".,") for word in probe.better.split() if word[0].isdigit()]
        assert all(number in shown for number in numbers), probe.prompt
