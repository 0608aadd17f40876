"""A closed gate ends a stage before anything is trained but keeps its rows, and with other limits it resumes."""

from pathlib import Path
from typing import Any

import pytest

from align.engines.engine import Request
from align.errors import GateClosed, InputError
from align.feedback.records import Critique, Revision
from align.settings.data import PromptSource
from align.stages.compare import STAGE as COMPARE
from align.stages.compare import CompareBlock
from align.stages.revise import STAGE as REVISE
from align.stages.revise import ReviseBlock
from align.stages.sample import STAGE as SAMPLE
from align.stages.sample import SampleBlock
from tests.stages.test_sample_revise_compare import ASKING, World, reply, scripted, varied


@pytest.fixture
def world(tmp_path: Path, tiny_prompts: Path) -> World:
    (tmp_path / "asking.yaml").write_text(ASKING)
    return World(tmp_path, tiny_prompts)


def revise(**gates: Any) -> ReviseBlock:
    return ReviseBlock.model_validate({"splits": ["sft", "preference"], "gates": {"min_rows": 1, **gates}})


def test_one_closing_sentence_under_every_revision_closes_the_gate_and_loses_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, reply)
    world.run(SAMPLE, SampleBlock())
    with pytest.raises(GateClosed, match=r"revise\.gates\.same_closing is closed: 100\.0% .*'shall i go on\?'"):
        world.run(REVISE, revise())

    def never(request: Any) -> str:
        raise AssertionError("a completion was asked for again")

    scripted(monkeypatch, never)
    outcome = world.run(REVISE, revise(same_closing=None, same_ending=None))
    accepted = world.rows("revise/revisions.jsonl", Revision)
    assert outcome.figures["gates"]["same_closing"] == {"share": 1.0, "count": len(accepted), "rows": len(accepted)}


def test_refused_benign_prompts_close_the_gate(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = "I'm sorry, but I can't help with that. Is there a friend you could ask?"
    scripted(monkeypatch, lambda request: refusal if len(request.messages) > 1 else reply(request))
    world.run(SAMPLE, SampleBlock())
    open_otherwise = {"same_closing": None, "same_ending": None, "same_opening": None, "not_accepted": None}

    with pytest.raises(GateClosed, match=r"benign_refused is closed: 100\.0% of \d+ benign prompts are refused"):
        world.run(REVISE, revise(benign=["benign"], **open_otherwise))
    assert world.run(REVISE, revise(**open_otherwise)).figures["gates"]["benign_refused"]["rows"] == 0
    with pytest.raises(InputError, match=r"revise\.gates\.benign: no prompt of category or file 'bening'"):
        world.run(REVISE, revise(benign=["bening"]))


@pytest.mark.parametrize("filters", [None, ["preamble"]])
def test_revisions_that_only_refuse_close_the_gate_whatever_the_filters(
    world: World, monkeypatch: pytest.MonkeyPatch, filters: list[str] | None
) -> None:
    refusal = "I'm sorry, but I can't help with that."
    scripted(monkeypatch, lambda request: refusal if len(request.messages) > 1 else reply(request))
    world.run(SAMPLE, SampleBlock())
    block = revise(not_accepted=None, same_closing=None, same_ending=None, same_opening=None)
    block = block.model_copy(update={"filters": tuple(filters), "near_duplicates": None} if filters else {})
    with pytest.raises(GateClosed, match=r"refusal_only is closed: 100\.0% of \d+ revisions refuse .*I'm sorry"):
        world.run(REVISE, block)


def test_critiques_that_were_cut_say_so_and_are_counted_and_shown_without_a_limit(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rambling(request: Request) -> str:
        if request.messages[-1].content.startswith("Point out"):
            return "It ends with a full stop " + ("and so on and on." if request.seed % 2 else "here.")
        return "Is it?" if request.messages[-1].content.startswith("Rewrite") else "It is."

    scripted(monkeypatch, rambling)
    world.run(SAMPLE, SampleBlock())
    block = revise(same_closing=None, same_ending=None, same_opening=None, cut=0.0)
    sampling = block.sampling.model_copy(update={"max_new_tokens": 8})
    outcome = world.run(REVISE, block.model_copy(update={"sampling": sampling, "rounds": 2, "filters": ()}))

    critiques = world.rows("revise/critiques.jsonl", Critique)
    cut = [row for row in critiques if row.critique_finish_reason == "length"]
    assert {row.id for row in cut} == {row.id for row in critiques if row.critique_seed % 2}
    assert {row.critique_finish_reason for row in critiques} == {"length", "stop"}
    assert {row.finish_reason for row in critiques} == {"stop"}
    assert outcome.counts["critiques_cut"] == len(cut)
    share = {"share": len(cut) / len(critiques), "count": len(cut), "rows": len(critiques)}
    assert outcome.figures["gates"]["critiques_cut"] == share


def test_nothing_is_said_of_critiques_where_none_is_asked_for_and_older_rows_are_read(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, reply)
    world.run(SAMPLE, SampleBlock())
    outcome = world.run(REVISE, revise(same_ending=None, same_closing=None).model_copy(update={"critique": False}))

    assert "critiques_cut" not in {**outcome.counts, **outcome.figures["gates"]}
    row = world.rows("revise/critiques.jsonl", Critique)[0].to_json()
    assert row.pop("critique_finish_reason") is None
    assert Critique.from_json(row).critique_finish_reason is None


def test_benign_prompts_of_which_none_is_revised_are_reported(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, reply)
    (world.root / "more.jsonl").write_text('{"prompt": "Why?", "split": "rl", "category": "kept for later"}\n')
    sources = [*world.shared["prompts"].sources, PromptSource(path=str(world.root / "more.jsonl"))]
    world.shared["prompts"] = world.shared["prompts"].model_copy(update={"sources": tuple(sources)})
    world.run(SAMPLE, SampleBlock())
    with pytest.raises(InputError, match=r"'kept for later' of the splits sft, preference in .*add prompts"):
        world.run(REVISE, revise(benign=["kept for later"]))


def test_near_duplicates_are_rejected_by_name_and_kept_beside(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    same = "It is one and the same long text for whoever asks and whatever it was that they asked, is it not?"
    scripted(monkeypatch, lambda request: same if len(request.messages) > 1 else reply(request))
    world.run(SAMPLE, SampleBlock())
    outcome = world.run(REVISE, ReviseBlock(splits=("sft", "preference"), critique=False))

    accepted, rejected = world.rows("revise/revisions.jsonl", Revision), world.rows("revise/rejected.jsonl", Revision)
    assert sorted(row.split for row in accepted) == ["preference", "sft"], "the first of each split"
    assert {row.reason for row in rejected} == {"near-duplicate"}
    assert outcome.counts["rejected: near-duplicate"] == len(rejected)


def test_cut_completions_close_the_gate_of_compare(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, varied)
    world.run(SAMPLE, SampleBlock())
    block = CompareBlock.model_validate({"sampling": {"max_new_tokens": 1}, "gates": {"min_rows": 1, "cut": 0.1}})

    with pytest.raises(GateClosed, match=r"compare\.gates\.cut is closed"):
        world.run(COMPARE, block)
