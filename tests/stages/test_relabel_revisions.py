"""Relabelling revision pairs from the scores that `revise` kept gives a run's own bytes, and a fresh run's."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from align.__main__ import main
from align.engines.engine import ChoiceRequest, Request
from align.errors import InputError
from align.feedback.judged_revisions import REVISION_FILES
from align.feedback.records import OpinionScores, Revision
from align.records import Message, PreferencePair, Sample
from align.results.relabel import relabel
from align.run.artefacts import Manifest, read_manifest, write_json
from align.settings.blocks import JudgeBlock
from align.stages.revise import STAGE as REVISE
from align.stages.revise import ReviseBlock
from align.stages.sample import STAGE as SAMPLE
from align.stages.sample import SampleBlock
from tests.stages.test_relabel import KINDS, PRINCIPLES, compare, constitution, dice, no_call
from tests.stages.test_sample_revise_compare import World, scripted
from tests.tiny import build_tiny_prompts

LABELS = ("comparisons.jsonl", "pairs.jsonl", "provenance.jsonl", *REVISION_FILES)
GATES = {"same_closing": None, "same_ending": None, "same_opening": None, "repetition": None, "not_accepted": None}


def words(request: Request) -> str:
    """Some texts are short; long ones differ in one word, so that later ones are near-duplicates of the first."""
    ending = " and it goes on like this for as long as anybody wants to hear of it" * (request.seed % 3 > 0)
    return f"It is {request.seed % 97}{ending}{'?' if request.seed % 2 else '!'}"


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(tmp_path, build_tiny_prompts(tmp_path / "prompts.jsonl", 72))
    made.shared["constitution"] = constitution(tmp_path / "four.yaml")
    scripted(monkeypatch, words, dice)
    made.run(SAMPLE, SampleBlock.model_validate({"splits": ["sft", "preference"]}))
    return made


def revise(world: World, judge: dict[str, Any], **settings: Any) -> None:
    """Run the revise stage from scratch."""
    shutil.rmtree(world.root / "revise", ignore_errors=True)
    given = {"splits": ["sft", "preference"], "filters": [], "gates": GATES, "near_duplicates": 0.6, **settings}
    block = ReviseBlock.model_validate(given)
    world.shared["judge"] = JudgeBlock.model_validate({"allow_chance": True, **judge})
    outcome = world.run(REVISE, block)
    manifest = Manifest("revise", "f", {"settings": block.model_dump(mode="json")}, {}, {}, dict(outcome.counts))
    write_json(world.root / "revise/manifest.json", manifest.__dict__)


def run(world: World, judge: dict[str, Any], output: str = "compare", principle: str = "all", **settings: Any) -> Path:
    """Run both stages; returns the folder of the second, which is all that relabelling reads."""
    revise(world, judge, principle=principle, **settings)
    stage = compare(world, judge, output, revision_pairs=True)
    shutil.rmtree(world.root / "revise")
    return stage


def counts(folder: Path) -> dict[str, int]:
    manifest = read_manifest(folder)
    assert manifest
    return manifest.counts


def judged(world: World, folder: str) -> dict[str, Revision]:
    return {row.id: row for row in world.rows(f"{folder}/{REVISION_FILES[0]}", Revision)}


def same(one: Path, other: Path) -> bool:
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in LABELS)


@pytest.mark.parametrize("principle", ["all", "draw"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_settings_give_the_run_s_own_bytes_and_counts(
    world: World, monkeypatch: pytest.MonkeyPatch, kind: str, principle: str
) -> None:
    stage = run(world, {"kind": kind}, principle=principle)
    monkeypatch.setattr("align.engines.open.open_engine", no_call)
    relabel(stage, world.root / "again")

    assert same(stage, world.root / "again")
    assert counts(stage) == counts(world.root / "again")
    made = counts(stage)["revision_pairs"]
    rejected = sum(count for name, count in counts(stage).items() if name.startswith("revision_pairs_rejected"))
    assert 0 < made < len(judged(world, "compare")) == made + rejected
    assert kind == "rule" or counts(stage)["revision_pairs_rejected: near-duplicate"]


@pytest.mark.parametrize(
    "changes",
    [{"clamp": 0.3}, {"min_margin": 0.2, "clamp": 0.1}, {"min_margin": 0.05}, {"min_option_mass": 0.3}, {"scale": 0.5}],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_other_settings_give_what_a_fresh_run_with_them_gives(world: World, kind: str, changes: dict[str, Any]) -> None:
    stage = run(world, {"kind": kind, "min_margin": 0.1})
    fresh = run(world, {"kind": kind, "min_margin": 0.1, **changes}, "fresh")
    relabel(stage, world.root / "again", overrides=[f"judge.{key}={value}" for key, value in changes.items()])
    back = [f"judge.{key}={getattr(JudgeBlock(min_margin=0.1), key)}" for key in changes]
    relabel(world.root / "again", world.root / "back", overrides=back)

    assert same(fresh, world.root / "again")
    assert counts(fresh) == counts(world.root / "again")
    assert same(stage, world.root / "back")
    pairs = [pair for pair in world.rows("again/pairs.jsonl", PreferencePair) if pair.source == "revision"]
    assert max(pair.probability for pair in pairs) <= 1 - changes.get("clamp", 0)


def test_a_wider_margin_rejects_new_ties_and_accepts_revisions_that_only_repeated_them(
    world: World,
) -> None:
    stage = run(world, {"kind": "choice"})
    relabel(stage, world.root / "again", overrides=["judge.min_margin=0.2"])

    before, after = judged(world, "compare"), judged(world, "again")
    assert list(before) == list(after)
    now_tied = [row for row in after.values() if row.reason == "tie" and before[row.id].reason != "tie"]
    assert any(before[row.id].accepted for row in now_tied)
    assert any(row.accepted and before[row.id].reason == "near-duplicate" for row in after.values())
    told = counts(world.root / "again")["revision_pairs_rejected: tie"]
    assert told == sum(row.reason == "tie" for row in after.values())
    pairs = [p for p in world.rows("again/pairs.jsonl", PreferencePair) if p.source == "revision"]
    assert {p.chosen[0].content for p in pairs} == {row.completion for row in after.values() if row.accepted}


def test_a_revision_that_other_weights_find_worse_makes_no_pair_and_one_that_they_find_better_makes_one(
    world: World,
) -> None:
    stage = run(world, {"kind": "choice"}, near_duplicates=None)
    other = constitution(world.root / "other.yaml", short={"tier": "first", "weight": 9}, calm={"tier": None})
    relabel(stage, world.root / "again", constitution=other)
    world.shared["constitution"] = other
    # The words that revisions are asked for by are the same: so are the revisions.
    fresh = run(world, {"kind": "choice"}, "fresh", near_duplicates=None)

    rows = [judged(world, name) for name in ("compare", "again", "fresh")]
    now_worse = [key for key, row in rows[1].items() if row.reason == "judged worse" and rows[0][key].accepted]
    now_better = [key for key, row in rows[1].items() if row.accepted and rows[0][key].reason == "judged worse"]
    assert now_worse and now_better
    verdicts = [[(row.id, row.p_better, row.accepted, row.judged_by) for row in each.values()] for each in rows]
    assert verdicts[1] == verdicts[2]
    assert counts(world.root / "again") == counts(fresh)


@pytest.mark.parametrize("kind", KINDS)
def test_one_principle_a_revision_instead_of_all_is_what_a_fresh_run_draws(world: World, kind: str) -> None:
    stage = run(world, {"kind": kind})
    fresh = run(world, {"kind": kind}, "fresh", principle="draw")
    relabel(stage, world.root / "again", overrides=["revise.principle=draw"])

    assert same(fresh, world.root / "again")
    if kind != "rule":
        with pytest.raises(InputError, match=r"revision_opinions\.jsonl: the judge was never asked about principle"):
            relabel(fresh, world.root / "all", overrides=["revise.principle=all"])


def test_every_question_principle_and_order_is_stored_with_what_the_engine_gave(world: World) -> None:
    revise(world, {"kind": "choice"})

    rows = world.rows("revise/revisions.jsonl", Revision) + world.rows("revise/rejected.jsonl", Revision)
    asked_of = {row.sample_id: row for row in rows if row.judge_provenance}
    opinions = world.rows("revise/opinions.jsonl", OpinionScores)
    order = [row.id for row in world.rows("sample/samples.jsonl", Sample) if row.id in asked_of]
    assert list(dict.fromkeys(row.comparison_id for row in opinions)) == order
    applying = {key: 4 if row.category == "odd" else 3 for key, row in asked_of.items()}
    assert len({row.id for row in opinions}) == len(opinions) == 2 * sum(applying.values()) > 0
    for row in opinions:
        of = asked_of[row.comparison_id]
        first, second = (of.completion, of.original) if row.view == "ab" else (of.original, of.completion)
        parts = [
            "Here is a conversation between a user and an assistant.",
            f"User: {of.prompt[0].content}",
            f"Choose the response that follows this principle better: {PRINCIPLES[row.principle_id]['text']}",
            f"(A) {first}",
            f"(B) {second}",
            "Which response is it? Answer with one letter, A or B.",
        ]
        asked = ChoiceRequest("", (Message("user", "\n\n".join(parts)),), ("A", "B"))
        assert row.logprobs == (dice(asked, "A"), dice(asked, "B"))


@pytest.mark.parametrize("death", [3, 20])
def test_a_stage_that_died_keeps_the_same_scores(world: World, monkeypatch: pytest.MonkeyPatch, death: int) -> None:
    settings = {"window": 4, "critique": False}
    revise(world, {"kind": "choice"}, **settings)
    names = ("opinions.jsonl", "revisions.jsonl", "rejected.jsonl")
    whole = {name: (world.root / "revise" / name).read_bytes() for name in names}
    left = iter(range(death))

    def dying(request: ChoiceRequest, choice: str) -> float:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return dice(request, choice)

    scripted(monkeypatch, words, dying)
    with pytest.raises(KeyboardInterrupt):
        revise(world, {"kind": "choice"}, **settings)
    scripted(monkeypatch, words, dice)
    block = ReviseBlock.model_validate(
        {"splits": ["sft", "preference"], "filters": [], "gates": GATES, "near_duplicates": 0.6, **settings}
    )
    world.run(REVISE, block)

    assert {name: (world.root / "revise" / name).read_bytes() for name in names} == whole


def test_without_stored_scores_revision_pairs_keep_their_labels_and_that_is_reported(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    revise(world, {"kind": "rule"})
    (world.root / "revise/opinions.jsonl").unlink()
    stage = compare(world, {"kind": "rule"}, revision_pairs=True)
    command = ["relabel", str(stage), "--output", str(world.root / "again"), "--set", "judge.clamp=0.2"]
    assert main(command) == 0

    before, after = (
        [pair for pair in world.rows(f"{folder}/pairs.jsonl", PreferencePair) if pair.source == "revision"]
        for folder in ("compare", "again")
    )
    assert before == after and max(pair.probability for pair in before) > 0.9
    told = capsys.readouterr().out
    assert f"{len(before)} revision pairs keep the label that `revise` gave them, since" in told
    assert counts(world.root / "again")["revision_pairs_not_relabelled"] == len(before)
    assert not any((world.root / "again" / name).exists() for name in REVISION_FILES)
    with pytest.raises(InputError, match=r"--set revise\.principle=draw: .* keeps no scores of revisions"):
        relabel(stage, world.root / "other", overrides=["revise.principle=draw"])


def test_the_manifest_names_the_files_of_relabelled_revisions(world: World) -> None:
    stage = run(world, {"kind": "choice"})
    relabel(stage, world.root / "again", overrides=["revise.principle=draw"])

    manifest = read_manifest(world.root / "again")
    assert manifest and set(REVISION_FILES) < set(manifest.outputs)
    kept = json.loads((world.root / "again" / REVISION_FILES[2]).read_text())
    assert kept == manifest.settings["revise"] == {"principle": "draw", "near_duplicates": 0.6}
