"""Relabelling from stored scores gives the same bytes with the same settings, and a fresh run's with other settings."""

import json
import zlib
from pathlib import Path
from typing import Any

import pytest

from align.__main__ import main
from align.engines.engine import ChoiceRequest, Request
from align.engines.provenance import read_constitution, read_provenance
from align.errors import FileProblems, InputError
from align.feedback.records import Comparison, OpinionScores
from align.records import Message, PreferencePair
from align.results.relabel import relabel
from align.run.artefacts import Manifest, file_digest, output_digests, read_manifest, write_json
from align.settings.blocks import JudgeBlock
from align.stages.compare import STAGE as COMPARE
from align.stages.compare import CompareBlock
from align.stages.sample import STAGE as SAMPLE
from align.stages.sample import SampleBlock
from tests.stages.test_sample_revise_compare import World, scripted

PRINCIPLES = {
    "asks": {"text": "Ask.", "opposite": "Tell.", "rule": {"ends_with": "?"}, "weight": 3},
    "calm": {"text": "Be calm.", "opposite": "Be wild.", "rule": {"excludes": "!"}, "tier": "first"},
    "short": {"text": "Be short.", "opposite": "Be long.", "rule": {"max_words": 4}},
    "even": {"text": "Be even.", "opposite": "Be odd.", "applies": ["odd"]},
}
LABELS = ("comparisons.jsonl", "pairs.jsonl")


def constitution(path: Path, *names: str, **changes: Any) -> str:
    principles = [{"id": name, **PRINCIPLES[name], **changes.get(name, {})} for name in names or PRINCIPLES]
    path.write_text(json.dumps({"title": "Four", "tiers": ["first"], "principles": principles}))
    return str(path)


def words(request: Request) -> str:
    ending = " So." * (request.seed % 3)
    return f"Is it {request.seed % 7}?" if request.seed % 2 else f"It is {request.seed % 5}!{ending}"


def dice(request: ChoiceRequest, choice: str) -> float:
    """A log-probability that depends on the whole request; one choice in seven is very unlikely."""
    asked = f"{[message.content for message in request.messages]} {choice}"
    number = zlib.crc32(asked.encode())
    return -20.0 if number % 7 == 0 else -(number % 9973) / 3001 - 0.7


@pytest.fixture
def world(tmp_path: Path, tiny_prompts: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(tmp_path, tiny_prompts)
    made.shared["constitution"] = constitution(tmp_path / "four.yaml")
    scripted(monkeypatch, words, dice)
    made.run(SAMPLE, SampleBlock.model_validate({"splits": ["sft", "preference"]}))
    return made


def compare(world: World, judge: dict[str, Any], output: str = "compare", **settings: Any) -> Path:
    """A finished compare stage's folder, with its manifest."""
    block = CompareBlock.model_validate({"completions": 3, **settings})
    world.shared["judge"] = JudgeBlock.model_validate({"allow_chance": True, **judge})
    outcome = world.run(COMPARE, block, output)
    dumped = world.shared["judge"].model_dump(mode="json")
    slice_ = {"stage": "compare", "seed": 7, "settings": block.model_dump(mode="json"), "judge": dumped}
    folder = world.root / output
    written = output_digests(folder, [name for name in COMPARE.outputs if (folder / name).exists()])
    manifest = Manifest("compare", "f", slice_, {}, written, dict(outcome.counts), dict(outcome.figures))
    write_json(folder / "manifest.json", manifest.__dict__)
    return world.root / output


def same_labels(one: Path, other: Path) -> bool:
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in LABELS)


def no_call(*_: Any) -> Any:
    raise AssertionError("an engine was opened")


KINDS = ["choice", "contrast", "rule"]


@pytest.mark.parametrize("principle", ["all", "draw"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_settings_give_the_same_bytes(
    world: World, monkeypatch: pytest.MonkeyPatch, kind: str, principle: str
) -> None:
    stage = compare(world, {"kind": kind}, principle=principle)
    monkeypatch.setattr("align.engines.open.open_engine", no_call)
    counted = relabel(stage, world.root / "again")

    assert same_labels(stage, world.root / "again")
    for name in ("opinions.jsonl", "provenance.jsonl"):
        assert (stage / name).read_bytes() == (world.root / "again" / name).read_bytes()
    before, after = read_manifest(stage), read_manifest(world.root / "again")
    assert before and after
    assert after.counts == counted == {name: before.counts[name] for name in counted}
    assert counted["pairs"] > 5
    assert after.figures == {name: before.figures[name] for name in after.figures}


def with_worked_choices(path: Path) -> str:
    content = json.loads(Path(constitution(path)).read_text())
    thought = {"reasoning": "So it is (B).", "answer": "B"}
    content["comparisons"] = [{"prompt": f"{n}?", "better": "yes", "worse": "no", **thought} for n in range(2)]
    content["principles"][0]["comparisons"] = [{"prompt": "Own?", "better": "yes", "worse": "no", **thought}]
    path.write_text(json.dumps(content))
    return str(path)


@pytest.mark.parametrize("examples", [0, 2, 3])
@pytest.mark.parametrize("thinks", [False, True])
def test_stored_chains_of_thought_serve_any_choice_of_principles(world: World, thinks: bool, examples: int) -> None:
    world.shared["constitution"] = with_worked_choices(world.root / "worked.yaml")
    judge = {"kind": "choice", "chain_of_thought": thinks, "examples": examples}
    stage = compare(world, {**judge, "reasoning": {"max_new_tokens": 2}})
    relabel(stage, world.root / "same")
    relabel(stage, world.root / "some", principles=["short", "calm"])
    relabel(stage, world.root / "wide", overrides=["judge.chain_of_thought_range=[0.1, 0.9]"])

    assert same_labels(stage, world.root / "same")
    before = {row.id: row for row in world.rows("compare/comparisons.jsonl", Comparison)}
    for row in world.rows("some/comparisons.jsonl", Comparison):
        own = before[row.id].p_a_by_principle
        assert row.p_a_by_principle == {name: own[name] for name in ("calm", "short") if name in own}
    most = max(max(row.p_a_by_principle.values(), default=0.5) for row in before.values())
    wide = [row.p_a_by_principle for row in world.rows("wide/comparisons.jsonl", Comparison)]
    assert most <= 0.6 or not thinks
    assert (max(max(each.values(), default=0.5) for each in wide) > 0.6) or not thinks


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({"clamp": 0.3}, {}),
        ({"min_margin": 0.2, "clamp": 0.1}, {}),
        ({"min_option_mass": 0.3}, {}),
        ({"scale": 0.5}, {}),
        ({}, {"principle": "draw"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_other_settings_give_what_a_fresh_run_with_them_gives(
    world: World, kind: str, changes: dict[str, Any], settings: dict[str, Any]
) -> None:
    stage = compare(world, {"kind": kind})
    fresh = compare(world, {"kind": kind, **changes}, "fresh", **settings)
    given = {"judge": changes, "compare": settings}
    overrides = [f"{block}.{key}={value}" for block, keys in given.items() for key, value in keys.items()]
    relabel(stage, world.root / "again", overrides=overrides)

    assert same_labels(fresh, world.root / "again")
    assert read_manifest(world.root / "again").settings["judge"] == read_manifest(fresh).settings["judge"]  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", KINDS)
def test_a_choice_of_principles_gives_what_a_fresh_run_with_them_gives(world: World, kind: str) -> None:
    stage = compare(world, {"kind": kind})
    world.shared["constitution"] = constitution(world.root / "two.yaml", "asks", "short")
    fresh = compare(world, {"kind": kind}, "fresh")
    relabel(stage, world.root / "again", principles=["asks", "short"])

    assert same_labels(fresh, world.root / "again")
    assert not same_labels(stage, fresh)


@pytest.mark.parametrize("kind", KINDS)
def test_other_weights_tiers_and_rules_ask_no_model(world: World, kind: str) -> None:
    stage = compare(world, {"kind": kind})
    other = constitution(
        world.root / "other.yaml", short={"tier": "first", "weight": 9}, calm={"hard": True, "tier": None}
    )
    world.shared["constitution"] = other
    fresh = compare(world, {"kind": kind}, "fresh")
    relabel(stage, world.root / "again", constitution=other)

    assert same_labels(fresh, world.root / "again")
    assert not same_labels(stage, fresh)


def test_every_question_principle_and_order_is_stored_with_what_the_engine_gave(world: World) -> None:
    compare(world, {"kind": "choice"})

    comparisons = {row.id: row for row in world.rows("compare/comparisons.jsonl", Comparison)}
    opinions = world.rows("compare/opinions.jsonl", OpinionScores)
    judged = [row for row in comparisons.values() if row.judge]
    applying = {row.id: 4 if row.category == "odd" else 3 for row in judged}
    assert len({row.id for row in opinions}) == len(opinions) == 2 * sum(applying.values())
    assert {row.view for row in opinions} == {"ab", "ba"}
    for row in opinions:
        compared = comparisons[row.comparison_id]
        shown = (compared.completion_a, compared.completion_b)
        first, second = shown if row.view == "ab" else shown[::-1]
        question = f"Choose the response that follows this principle better: {PRINCIPLES[row.principle_id]['text']}"
        parts = [
            "Here is a conversation between a user and an assistant.",
            f"User: {compared.prompt[0].content}",
            question,
            f"(A) {first}",
            f"(B) {second}",
            "Which response is it? Answer with one letter, A or B.",
        ]
        asked = ChoiceRequest("", (Message("user", "\n\n".join(parts)),), ("A", "B"))
        assert row.logprobs == (dice(asked, "A"), dice(asked, "B"))


def test_contrasts_are_stored_as_sums_with_their_tokens(world: World) -> None:
    compare(world, {"kind": "contrast"})

    [*rows] = world.rows("compare/opinions.jsonl", OpinionScores)
    assert {row.view for row in rows} == {"a", "a opposite", "b", "b opposite"}
    comparisons = {row.id: row for row in world.rows("compare/comparisons.jsonl", Comparison)}
    for row in rows:
        compared = comparisons[row.comparison_id]
        scored = compared.completion_a if row.view.startswith("a") else compared.completion_b
        assert row.tokens == (len(scored.split()),)
    assert all(row.option_mass is None for row in rows)


def test_ties_and_abstentions_are_counted_apart(world: World) -> None:
    stage = compare(world, {"kind": "choice", "min_margin": 0.2, "min_option_mass": 0.3}, principle="draw")

    rows = world.rows("compare/comparisons.jsonl", Comparison)
    opinions = world.rows("compare/opinions.jsonl", OpinionScores)
    unlikely = {row.comparison_id for row in opinions if (row.option_mass or 0) < 0.3}
    manifest = read_manifest(stage)
    assert manifest
    assert manifest.counts["undecided: the judge abstained"] == len(unlikely) > 0
    assert {row.id for row in rows if row.reason == "the judge abstained"} == unlikely
    assert manifest.counts["undecided: tie"] == sum(row.reason == "tie" for row in rows) > 0
    assert manifest.counts["opinions"] == len(opinions) / 2
    assert manifest.counts["opinions_abstained"] == len(unlikely)
    assert manifest.counts["pairs"] == sum(row.p_a is not None for row in rows)


def test_the_results_of_the_judge_s_tests_are_copied(world: World) -> None:
    human = world.root / "human.jsonl"
    pairs = [{"prompt": f"{number}", "chosen": "Is it so?", "rejected": "It is so."} for number in range(8)]
    human.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    stage = compare(world, {"kind": "rule"}, calibration={"human": [{"path": str(human)}]})
    relabel(stage, world.root / "again", overrides=["judge.clamp=0.2"])

    before, after = read_manifest(stage), read_manifest(world.root / "again")
    assert before and after
    assert [after.figures[name] for name in ("judge", "calibration")] == [
        before.figures[name] for name in ("judge", "calibration")
    ]
    rows = (stage / "calibration.jsonl").read_bytes()
    assert (world.root / "again/calibration.jsonl").read_bytes() == rows != b""
    assert after.outputs["calibration.jsonl"] == file_digest(stage / "calibration.jsonl")


def test_relabelling_needs_no_documents_and_stores_none_of_their_folders(world: World) -> None:
    documents = world.root / "secret-folder"
    documents.mkdir()
    (documents / "facts.txt").write_text("Questions end with a mark.")
    path = Path(world.shared["constitution"])
    content = json.loads(path.read_text())
    content["sources"] = "secret-folder"
    content["principles"][1]["sources"] = []
    path.write_text(json.dumps(content))
    stage = compare(world, {"kind": "choice"})
    (documents / "facts.txt").unlink()
    documents.rmdir()
    relabel(stage, world.root / "again")
    relabel(world.root / "again", world.root / "back")

    assert same_labels(stage, world.root / "back")
    used = {entry.constitution_digest for entry in read_provenance(stage).values() if entry.step == "label"}
    for folder in (stage, world.root / "again", world.root / "back"):
        kept = folder / "constitution.json"
        assert "secret-folder" not in kept.read_text() and str(world.root) not in kept.read_text()
        assert {read_constitution(kept).digest} == used


def test_a_changed_principle_is_refused(world: World) -> None:
    stage = compare(world, {"kind": "choice"})
    other = constitution(world.root / "other.yaml", calm={"text": "Be very calm."})

    with pytest.raises(InputError, match=r"never asked about principle 'calm' with this text.*run `compare`"):
        relabel(stage, world.root / "again", constitution=other)
    assert not (world.root / "again").exists()


def test_changed_documents_are_refused(world: World) -> None:
    (world.root / "facts").mkdir()
    facts, path = world.root / "facts/facts.txt", Path(world.shared["constitution"])
    facts.write_text("Questions end with a mark.")
    path.write_text(json.dumps({**json.loads(path.read_text()), "sources": "facts"}))
    stage = compare(world, {"kind": "choice"})
    relabel(stage, world.root / "same", constitution=str(path))
    assert same_labels(stage, world.root / "same")
    facts.write_text("Questions end with two marks.")
    with pytest.raises(InputError, match=r"never asked about principle 'asks' .*and these documents"):
        relabel(stage, world.root / "again", constitution=str(path))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"overrides": ["judge.kind=contrast"]},
            r"--set judge\.kind=contrast: relabelling can only change judge\.clamp",
        ),
        ({"overrides": ["judge.clamp=0.7"]}, r"judge\.clamp: .*0\.5"),
        ({"principles": ["asks", "loud"]}, "--principles loud: no such principle in 'four'; it has asks"),
        ({"principles": ["ask"]}, "--principles ask: no such principle in 'four'; did you mean `asks`?"),
        (
            {"overrides": ["judge.clamps=0.1"]},
            r"--set judge\.clamps=0\.1: relabelling can only change .*; did you mean `judge\.clamp`\?",
        ),
    ],
)
def test_bad_settings_are_reported(world: World, options: dict[str, Any], told: str) -> None:
    stage = compare(world, {"kind": "rule"})

    with pytest.raises((InputError, FileProblems), match=told):
        relabel(stage, world.root / "again", **options)


def test_the_command_finds_a_run_s_labels_and_overwrites_nothing(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = compare(world, {"kind": "rule"})
    command = ["relabel", str(world.root), "--output", str(world.root / "new"), "--set", "judge.clamp=0.2"]

    assert main([*command, "--principles", "asks,short"]) == 0
    assert "pairs " in capsys.readouterr().out
    pairs = world.rows("new/pairs.jsonl", PreferencePair)
    assert max(pair.probability for pair in pairs) == 0.8
    before = file_digest(world.root / "new/pairs.jsonl")
    assert main(command) == 2
    assert "already exists" in capsys.readouterr().err
    assert main(["relabel", str(world.root / "sample"), "--output", str(world.root / "x")]) == 2
    assert "no finished `compare`" in capsys.readouterr().err
    assert file_digest(world.root / "new/pairs.jsonl") == before
    (stage / "opinions.jsonl").unlink()
    assert main(["relabel", str(stage), "--output", str(world.root / "x")]) == 2


@pytest.mark.parametrize("name", ["comparisons.jsonl", "opinions.jsonl", "provenance.jsonl"])
def test_edited_scores_are_refused(world: World, name: str) -> None:
    folder = compare(world, {"kind": "choice"})
    with (folder / name).open("a") as file:
        file.write("\n")
    with pytest.raises(InputError, match=f"{name}: has changed since `compare` wrote it"):
        relabel(folder, world.root / "again")
    assert not (world.root / "again").exists()
