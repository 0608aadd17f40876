"""Each row names what made it: its seeds are those of the requests, and its provenance entries are in its folder."""

from pathlib import Path
from typing import Any

import pytest
from scripted_engine import ScriptedEngine

from align.data.sources import Intake
from align.engines.engine import EngineIdentity, Request
from align.engines.provenance import read_provenance
from align.errors import InputError
from align.feedback.records import Comparison, Critique, Revision
from align.records import PreferencePair, Sample
from align.settings.blocks import EngineBlock, JudgeBlock
from align.stages.compare import STAGE as COMPARE
from align.stages.compare import CompareBlock
from align.stages.revise import STAGE as REVISE
from align.stages.revise import ReviseBlock
from align.stages.sample import STAGE as SAMPLE
from align.stages.sample import SampleBlock
from align.stages.sft import STAGE as SFT
from align.stages.sft import SftBlock, gather
from tests.stages.test_sample_revise_compare import ASKING, World, oracle

BOTH = ("sft", "preference")


@pytest.fixture
def world(tmp_path: Path, tiny_prompts: Path) -> World:
    (tmp_path / "asking.yaml").write_text(ASKING)
    return World(tmp_path, tiny_prompts)


def answer(request: Request) -> str:
    """A text that names its request's seed, and is better after a revision."""
    last = request.messages[-1].content
    if last.startswith("Point out"):
        return f"It ends with a full stop, says {request.seed}."
    return f"Is it {request.seed}?" if last.startswith("Rewrite") or request.seed % 2 else f"It is {request.seed}."


@pytest.fixture
def made(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """A run of the three stages, in which critic, reviser and judge are separate engines."""

    def open_engine(engine: Any, model: Any, *, path: str | None = None) -> ScriptedEngine:
        return ScriptedEngine(answer, oracle, name=engine.model or (Path(path).parent.name if path else "base"))

    monkeypatch.setattr("align.engines.open.open_engine", open_engine)
    world.shared["judge"] = JudgeBlock(kind="choice", engine=EngineBlock(model="judge"))
    world.run(SAMPLE, SampleBlock(splits=BOTH))
    engines = {"engine": {"model": "reviser"}, "critic": {"model": "critic"}}
    world.run(REVISE, ReviseBlock.model_validate({"rounds": 2, "splits": BOTH, **engines}))
    world.run(COMPARE, CompareBlock(revision_pairs=True))
    return world


def number(text: str) -> int:
    return int("".join(filter(str.isdigit, text)))


def test_a_seed_in_a_row_is_the_one_that_its_text_was_asked_for_with(made: World) -> None:
    for sample in made.rows("sample/samples.jsonl", Sample):
        assert number(sample.completion) == sample.seed
    for critique in made.rows("revise/critiques.jsonl", Critique):
        assert (number(critique.critique), number(critique.revision)) == (critique.critique_seed, critique.seed)
    revisions = made.rows("revise/revisions.jsonl", Revision) + made.rows("revise/rejected.jsonl", Revision)
    for revision in revisions:
        assert (number(revision.completion), number(revision.original)) == (revision.seed, revision.original_seed)
    for row in made.rows("compare/comparisons.jsonl", Comparison):
        assert (number(row.completion_a), number(row.completion_b)) == (row.seed_a, row.seed_b)
    pairs = made.rows("compare/pairs.jsonl", PreferencePair)
    assert {pair.source for pair in pairs} == {"ai", "revision"}
    for pair in pairs:
        seeds = (pair.chosen_seed, pair.rejected_seed)
        assert (number(pair.chosen[0].content), number(pair.rejected[0].content)) == seeds


def models(made: World, stage: str) -> dict[str, tuple[str, str, str]]:
    entries = read_provenance(made.root / stage)
    return {"": ("", "", "")} | {each.id: (each.stage, each.step, each.model) for each in entries.values()}


def test_every_text_and_every_label_names_its_own_engine(made: World) -> None:
    named = models(made, "sample")
    assert {named[row.provenance] for row in made.rows("sample/samples.jsonl", Sample)} == {
        ("sample", "completion", "base")
    }
    named = models(made, "revise")
    for critique in made.rows("revise/critiques.jsonl", Critique):
        assert named[critique.critique_provenance] == ("revise", "critique", "critic")
        assert named[critique.provenance] == ("revise", "revision", "reviser")
    for row in made.rows("revise/revisions.jsonl", Revision):
        assert named[row.original_provenance] == ("sample", "completion", "base")
        assert named[row.provenance] == ("revise", "revision", "reviser")
        assert named[row.judge_provenance] == ("revise", "label", "judge")
        assert row.judged_by == ("asks",) and row.principle_ids == ("asks", "asks")


def test_a_pair_names_who_wrote_each_side_and_who_judged_at_whichever_stage_that_was(made: World) -> None:
    named = models(made, "compare")
    expected = {
        "ai": (("compare", "completion", "sft"), ("compare", "completion", "sft"), ("compare", "label", "judge")),
        "revision": (("revise", "revision", "reviser"), ("sample", "completion", "base"), ("revise", "label", "judge")),
    }
    for pair in made.rows("compare/pairs.jsonl", PreferencePair):
        ids = (pair.chosen_provenance, pair.rejected_provenance, pair.judge_provenance)
        assert tuple(named[each] for each in ids) == expected[pair.source]
        assert pair.judged_by == ("asks",)
        assert pair.revised_by == (("asks", "asks") if pair.source == "revision" else ())


def test_a_demonstration_names_who_wrote_it_and_by_which_principles(made: World) -> None:
    settings = SftBlock.model_validate({"helpful": {"share": 0.4, "harmless": ["odd", "benign"]}})
    named = models(made, "revise")
    rows = gather(made.context(SFT, settings), Intake())
    assert {row.source for row in rows} == {"revision", "own"}
    for row in rows:
        assert number(row.completion) == row.seed
        if row.source == "own":
            assert (named[row.provenance], row.revised_by) == (("sample", "completion", "base"), ())
            continue
        assert named[row.provenance] == ("revise", "revision", "reviser")
        assert named[row.judge_provenance] == ("revise", "label", "judge")
        assert (row.revised_by, row.judged_by) == (("asks", "asks"), ("asks",)) and row.p_better > 0.5


def test_entries_hold_the_constitutions_digest_the_sampling_and_how_the_judge_scores(made: World) -> None:
    from align.constitution.loading import load_constitution

    digest = load_constitution(made.shared["constitution"]).digest
    entries = {(each.stage, each.step): each for each in read_provenance(made.root / "compare").values()}
    assert {each.constitution_digest for key, each in entries.items() if "completion" not in key} == {digest}
    assert entries["revise", "revision"].settings["max_new_tokens"] == 256
    judged = entries["compare", "label"].settings
    assert (judged["kind"], judged["principle"], judged["scored_by"]) == ("choice", "all", "log-probabilities")


@pytest.mark.parametrize("stage", ["revise", "compare"])
def test_who_judges_is_settled_before_the_judge_is_asked(
    world: World, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """A stage that resumes after a kill sends no request to another model on its server."""
    asked: list[str] = []

    class Served(ScriptedEngine):
        def identity(self) -> EngineIdentity:
            return EngineIdentity("server", "m", said={"id": self.name})

        def choice_logprobs(self, *args: Any, **options: Any) -> Any:
            asked.append(self.name)
            if self.name == "first":
                raise InputError("killed")
            return super().choice_logprobs(*args, **options)

    serving = ["first"]
    monkeypatch.setattr(
        "align.engines.open.open_engine", lambda *_, **__: Served(lambda request: "So.", oracle, name=serving[0])
    )
    world.shared["judge"] = JudgeBlock(kind="choice")
    world.run(SAMPLE, SampleBlock(splits=BOTH))
    run = (REVISE, ReviseBlock()) if stage == "revise" else (COMPARE, CompareBlock())
    with pytest.raises(InputError, match="killed"):
        world.run(*run)
    serving[0] = "second"
    with pytest.raises(InputError, match="serve that model again"):
        world.run(*run)
    assert set(asked) == {"first"}


def test_a_row_that_a_hard_rule_decided_names_it_and_the_judge(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """This kind of judge gives no opinion by the rule, yet the hard principle decides."""
    hard = "  - {id: calm, text: Be calm., rule: {excludes: '!'}, hard: true}\n"
    Path(world.shared["constitution"]).write_text(ASKING + hard)

    def text(request: Request) -> str:
        calm = request.messages[-1].content.startswith("Rewrite") or request.seed % 2
        return f"It is {request.seed}{'.' if calm else '!'}"

    monkeypatch.setattr("align.engines.open.open_engine", lambda *_, **__: ScriptedEngine(text, lambda *_: -1.0))
    world.shared["judge"] = JudgeBlock(kind="contrast", allow_chance=True)
    world.run(SAMPLE, SampleBlock())
    world.run(REVISE, ReviseBlock(critique=False, filters=(), near_duplicates=None))
    world.run(COMPARE, CompareBlock())

    revisions = world.rows("revise/revisions.jsonl", Revision)
    assert revisions and all(row.original.endswith("!") for row in revisions)
    assert {(row.judged_by, bool(row.judge_provenance)) for row in revisions} == {(("calm",), True)}
    ties = [row for row in world.rows("revise/rejected.jsonl", Revision) if row.reason == "tie"]
    assert ties and {(row.judged_by, bool(row.judge_provenance)) for row in ties} == {((), True)}
    pairs = world.rows("compare/pairs.jsonl", PreferencePair)
    assert pairs and {(pair.judged_by, bool(pair.judge_provenance)) for pair in pairs} == {(("calm",), True)}


def test_what_no_judge_saw_names_none(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align.engines.open.open_engine", lambda *_, **__: ScriptedEngine(lambda request: "Same."))
    world.run(SAMPLE, SampleBlock())
    world.run(REVISE, ReviseBlock(critique=False))
    world.run(COMPARE, CompareBlock())
    rejected, comparisons = (
        world.rows("revise/rejected.jsonl", Revision),
        world.rows("compare/comparisons.jsonl", Comparison),
    )
    assert {row.reason for row in rejected} == {"copy"} and {row.judge_provenance for row in rejected} == {""}
    assert {row.judge_provenance for row in comparisons} == {""} != {row.provenance for row in comparisons}
    critiques = world.rows("revise/critiques.jsonl", Critique)
    assert {(row.critique_seed, row.critique_provenance) for row in critiques} == {(None, "")}
    steps = {entry.step for entry in read_provenance(world.root / "revise").values() if entry.stage == "revise"}
    assert steps == {"revision", "label"}, "nobody wrote a critique"
