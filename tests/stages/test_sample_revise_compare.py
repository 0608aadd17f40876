"""sample, revise and compare, from prompts to labelled pairs, with a scripted engine and with a tiny real model."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scripted_engine import ScriptedEngine

from align.constitution.loading import load_constitution
from align.data.sources import LEFT_OUT
from align.engines.engine import ChoiceRequest, Request
from align.errors import InputError, JudgeAtChance
from align.feedback.calibration import JudgedPair
from align.feedback.records import Comparison, Critique, Revision
from align.records import Message, PreferencePair, Prompt, Sample, read_jsonl, read_rows
from align.run.artefacts import output_digests
from align.run.stage import Context, Outcome, Stage
from align.settings.blocks import JudgeBlock, ModelBlock, TrackingBlock
from align.settings.data import PromptsBlock, SplitBlock
from align.stages.compare import STAGE as COMPARE
from align.stages.compare import CompareBlock
from align.stages.revise import STAGE as REVISE
from align.stages.revise import ReviseBlock
from align.stages.sample import STAGE as SAMPLE
from align.stages.sample import SampleBlock

ASKING = """\
title: Asking
principles:
  - id: asks
    text: End with a question.
    opposite: End with a statement.
    rule: {ends_with: "?"}
    probes:
      - {prompt: a, better: "Is it?", worse: "It is."}
      - {prompt: b, better: "Do you?", worse: "You do."}
      - {prompt: c, better: "Why?", worse: "So."}
      - {prompt: d, better: "Where?", worse: "There."}
"""


@pytest.fixture
def world(tmp_path: Path, tiny_prompts: Path) -> "World":
    (tmp_path / "asking.yaml").write_text(ASKING)
    return World(tmp_path, tiny_prompts)


class World:
    """The folders and blocks of one run."""

    def __init__(self, root: Path, prompts: Path) -> None:
        self.root = root
        self.shared: dict[str, Any] = {
            "model": ModelBlock(path="scripted"),
            "constitution": str(root / "asking.yaml"),
            "judge": JudgeBlock(kind="rule"),
            "prompts": PromptsBlock.model_validate({"sources": [{"path": str(prompts)}], "split": THIRDS}),
        }

    def context(self, stage: Stage, settings: Any, output: str | None = None) -> Context:
        directory = self.root / (output or stage.name)
        directory.mkdir(exist_ok=True)
        return Context(
            stage=stage.name,
            settings=settings,
            shared={name: self.shared[name] for name in stage.shares},
            inputs={name: self.root / name for name in (*stage.inputs(settings), *stage.optional_inputs(settings))},
            output=directory,
            seed=7,
            run_name="test",
            tracking=TrackingBlock(),
        )

    def run(self, stage: Stage, settings: Any, output: str | None = None) -> Outcome:
        return stage.run(self.context(stage, settings, output))

    def metrics(self, stage: str) -> list[dict[str, Any]]:
        return list(read_jsonl(self.root / stage / "metrics.jsonl"))

    def rows(self, path: str, kind: Any) -> list[Any]:
        return list(read_rows(self.root / path, kind))


NOTHING_ELSE = {"sft": 0, "preference": 0, "eval": 0}
THIRDS = {"sft": 0.4, "preference": 0.3, "rl": 0.2, "eval": 0.1}


def scripted(
    monkeypatch: pytest.MonkeyPatch,
    text: Callable[[Request], str],
    logprob: Callable[[ChoiceRequest, str], float] | None = None,
) -> list[str | None]:
    """Have every engine that a stage opens answer so, and return the list of the paths that they are opened with."""
    opened: list[str | None] = []

    def open_engine(engine: Any, model: Any, *, path: str | None = None) -> ScriptedEngine:
        opened.append(path)
        return ScriptedEngine(text, logprob)

    monkeypatch.setattr("align.engines.open.open_engine", open_engine)
    return opened


def reply(request: Request) -> str:
    """A statement in answer to a prompt, a question as a revision; some revisions are bad."""
    last = request.messages[-1].content
    if last.startswith("Point out"):
        return "It ends with a full stop."
    if last.startswith("Rewrite"):
        subject = request.messages[0].content
        if "Why" in subject:
            return "Sure, here is a revised response: Why not?"
        if "Where" in subject:
            return "It is over there, and it stays there."
        return f"About {subject} Shall I go on?"
    return f"It is known: {last}."


def test_sample_says_when_every_prompt_fell_into_other_splits(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted(monkeypatch, reply)
    world.shared["prompts"] = world.shared["prompts"].model_copy(update={"split": SplitBlock(rl=1, **NOTHING_ELSE)})
    assert world.run(SAMPLE, SampleBlock()).counts["samples"] == 0
    assert "none fell into sft or preference (24 in rl)" in capsys.readouterr().err
    world.run(SAMPLE, SampleBlock(splits=()))
    assert capsys.readouterr().err == ""


def test_sample_leaves_no_prompts_of_a_source_that_it_refuses(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, reply)
    (world.root / "bad.jsonl").write_text('{"prompt": "Why?"}\n{\n')
    world.shared["prompts"] = PromptsBlock.model_validate({"sources": [{"path": str(world.root / "bad.jsonl")}]})
    with pytest.raises(InputError, match=r"1 of 2 rows cannot be used(.|\n)*bad\.jsonl, line 2: not JSON"):
        world.run(SAMPLE, SampleBlock())
    assert [path.name for path in (world.root / "sample").iterdir()] == [LEFT_OUT]


def test_sample_writes_every_prompt_and_the_samples_of_its_splits(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, reply)
    outcome = world.run(SAMPLE, SampleBlock(splits=("sft", "rl")))

    prompts, samples = world.rows("sample/prompts.jsonl", Prompt), world.rows("sample/samples.jsonl", Sample)
    assert len(prompts) == outcome.counts["prompts"] == 24
    chosen = [prompt.id for prompt in prompts if prompt.split in ("sft", "rl")]
    assert [sample.prompt_id for sample in samples] == chosen
    assert {sample.split for sample in samples} == {"sft", "rl"}
    assert all(sample.completion == reply(_request(sample)) for sample in samples)
    assert len({sample.seed for sample in samples}) == len({sample.id for sample in samples}) == len(samples)
    assert outcome.counts["samples_cut"] == 0
    assert outcome.figures["categories"] == {"benign": 12, "odd": 12}
    [logged] = world.metrics("sample")
    assert (logged["prompts"], logged["samples"], logged["stopped"]) == (24, len(samples), 1.0)
    words = [len(sample.completion.split()) + 1 for sample in samples]
    assert logged["mean_tokens"] == pytest.approx(sum(words) / len(words)), "the scripted engine's stop token included"


def test_prompts_that_repeat_an_earlier_one_are_counted(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, reply)
    path = world.root / "twice.jsonl"
    path.write_text('{"prompt": "Why?"}\n{"prompt": "How?"}\n{"prompt": "Why?"}\n')
    world.shared["prompts"] = PromptsBlock.model_validate({"sources": [{"path": str(path)}]})
    counts = world.run(SAMPLE, SampleBlock()).counts
    assert (counts["prompts"], counts["prompts_repeated"]) == (2, 1)


def _request(sample: Sample) -> Request:
    return Request("x", sample.prompt, 0, 1)


def test_a_cut_sample_says_so(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, reply)
    outcome = world.run(SAMPLE, SampleBlock.model_validate({"sampling": {"max_new_tokens": 3}}))

    samples = world.rows("sample/samples.jsonl", Sample)
    assert {sample.finish_reason for sample in samples} == {"length"}
    assert outcome.counts["samples_cut"] == len(samples) > 0


def test_revise_keeps_what_the_judge_prefers_and_says_why_the_rest_was_rejected(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, reply)
    world.run(SAMPLE, SampleBlock())
    outcome = world.run(REVISE, ReviseBlock(splits=("sft", "preference")))

    accepted, rejected = world.rows("revise/revisions.jsonl", Revision), world.rows("revise/rejected.jsonl", Revision)
    samples = world.rows("sample/samples.jsonl", Sample)
    assert len(accepted) + len(rejected) == len(samples) == outcome.counts["samples"]
    assert all(row.completion.endswith("Shall I go on?") and row.p_better > 0.9 for row in accepted)
    assert all(row.original.startswith("It is known: ") for row in accepted)
    assert {row.reason for row in accepted} == {""}
    wrong = {"Why": "preamble", "Whe": "tie"}
    assert {(row.prompt[0].content[:3], row.reason) for row in rejected} == set(wrong.items())
    assert all(row.completion.startswith("Sure, here") for row in rejected if row.reason == "preamble")
    counts = Counter(row.reason for row in rejected)
    assert outcome.counts["rejected: preamble"] == counts["preamble"]
    assert outcome.counts["rejected: tie"] == counts["tie"]
    critiques = world.rows("revise/critiques.jsonl", Critique)
    assert {row.critique for row in critiques} == {"It ends with a full stop."}
    draws = outcome.figures["by_principle"]["asks"]
    assert draws == {"draws": len(samples), "filtered": counts["preamble"], "accepted": len(accepted)}
    [logged] = world.metrics("revise")
    assert logged["accepted"] == pytest.approx(len(accepted) / len(samples))
    assert logged["rejected: tie"] == pytest.approx(counts["tie"] / len(samples))
    assert logged["round/last"] == len(samples) - counts["preamble"]
    assert logged["round/last_accepted"] == pytest.approx(len(accepted) / logged["round/last"])


def test_revise_logs_a_row_for_each_round_and_which_one_the_accepted_texts_come_from(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first round's revisions are questions, the second's all begin with a preamble and are filtered out."""

    def spoil(request: Request) -> str:
        if not request.messages[-1].content.startswith("Rewrite"):
            return f"It is known: {request.messages[-1].content}."
        shown = request.messages[-2].content
        return "Sure, here is a revised response: Why?" if shown.endswith("?") else "What do you say, is it so?"

    scripted(monkeypatch, spoil)
    world.run(SAMPLE, SampleBlock())
    outcome = world.run(REVISE, ReviseBlock(rounds=2, critique=False))

    first, second = world.metrics("revise")
    assert (first["step"], second["step"]) == (1, 2)
    assert (first["round/filtered"], second["round/filtered"]) == (0.0, 1.0)
    assert (first["round/last"], first["round/last_accepted"], second["round/last"]) == (second["samples"], 1.0, 0)
    assert second["accepted"] == 1.0 and "accepted" not in first
    made = world.rows("revise/revisions.jsonl", Revision)
    assert {(row.principle_ids, row.revised_by) for row in made} == {(("asks", "asks"), ("asks",))}
    assert outcome.figures["by_round"][0]["characters"] == first["round/characters"]


def test_a_revision_that_is_worse_is_never_accepted(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(request: Request) -> str:
        return "A statement now." if request.messages[-1].content.startswith("Rewrite") else "Was it a question?"

    scripted(monkeypatch, spoil)
    world.run(SAMPLE, SampleBlock())
    outcome = world.run(REVISE, ReviseBlock(critique=False))

    assert world.rows("revise/revisions.jsonl", Revision) == []
    assert outcome.counts["rejected: judged worse"] == outcome.counts["samples"]


def test_a_revision_that_breaks_a_hard_rule_is_rejected_for_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    hard = '  - {id: calm, text: Be calm., hard: true, rule: {excludes: "!"}}\n'
    Path(world.shared["constitution"]).write_text(ASKING + hard)
    loud = "It is loud! Is it?"
    scripted(monkeypatch, lambda request: loud if len(request.messages) > 1 else "It is loud!!")
    world.run(SAMPLE, SampleBlock())
    outcome = world.run(REVISE, ReviseBlock(critique=False))

    assert outcome.counts["rejected: breaks calm"] == outcome.counts["samples"]


def test_revise_needs_samples_of_its_splits(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, reply)
    world.run(SAMPLE, SampleBlock(splits=("rl",)))

    with pytest.raises(InputError, match=r"no sample of the splits sft; add them to `sample\.splits`"):
        world.run(REVISE, ReviseBlock())


def varied(request: Request) -> str:
    """Two answers per prompt that mostly differ by the seed; some are identical, some empty."""
    subject = request.messages[-1].content
    if "Why" in subject:
        return "The same."
    if "Where" in subject:
        return "" if request.seed % 2 else "Somewhere."
    return f"So it is {request.seed % 97}." if request.seed % 2 else f"Is it {request.seed % 97}?"


def test_compare_labels_what_differs_and_keeps_the_rest_beside(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = scripted(monkeypatch, varied)
    world.run(SAMPLE, SampleBlock())
    outcome = world.run(COMPARE, CompareBlock())

    comparisons = world.rows("compare/comparisons.jsonl", Comparison)
    pairs = world.rows("compare/pairs.jsonl", PreferencePair)
    prompts = [prompt for prompt in world.rows("sample/prompts.jsonl", Prompt) if prompt.split == "preference"]
    assert [row.prompt_id for row in comparisons] == [prompt.id for prompt in prompts]
    assert opened[-1] == str(world.root / "sft" / "model")
    by_start = {row.prompt[0].content[:3]: row.reason for row in comparisons}
    assert by_start["Why"] == "identical"
    assert {row.reason for row in comparisons if row.prompt[0].content[:3] == "Whe"} <= {"empty", "identical"}
    decided = [row for row in comparisons if row.p_a is not None]
    assert len(pairs) == len(decided) == outcome.counts["pairs"] > 0
    for pair in pairs:
        assert pair.chosen[0].content.endswith("?")
        assert not pair.rejected[0].content.endswith("?")
        assert 0.9 < pair.probability <= 1
    undecided = sum(count for name, count in outcome.counts.items() if name.startswith("undecided: "))
    assert undecided + len(decided) == len(comparisons)
    [logged] = world.metrics("compare")
    assert logged["undecided"] == pytest.approx(undecided / len(comparisons))
    assert logged["undecided: identical"] == outcome.counts["undecided: identical"]
    assert logged["probability/90-100%"] == 1.0
    assert sum(value for name, value in logged.items() if name.startswith("probability/")) == pytest.approx(1)


def test_cut_completions_make_no_pair(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, varied)
    world.run(SAMPLE, SampleBlock())
    outcome = world.run(COMPARE, CompareBlock.model_validate({"sampling": {"max_new_tokens": 3}}))

    assert world.rows("compare/pairs.jsonl", PreferencePair) == []
    assert outcome.counts["undecided: cut"] > 0


def test_more_completions_are_compared_each_with_each(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, lambda request: f"Is it {request.seed}?")
    world.run(SAMPLE, SampleBlock())
    outcome = world.run(COMPARE, CompareBlock(completions=4, limit=2))

    assert outcome.counts["comparisons"] == 2 * 6


def test_accepted_revisions_are_pairs_where_asked_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, reply)
    world.run(SAMPLE, SampleBlock())
    world.run(REVISE, ReviseBlock(splits=("sft", "preference")))
    outcome = world.run(COMPARE, CompareBlock(revision_pairs=True))

    pairs = world.rows("compare/pairs.jsonl", PreferencePair)
    revisions = [row for row in world.rows("revise/revisions.jsonl", Revision) if row.split == "preference"]
    assert outcome.counts["revision_pairs"] == len(revisions) > 0
    assert [(p.chosen[0].content, p.rejected[0].content, p.probability, p.source) for p in pairs] == [
        (row.completion, row.original, row.p_better, "revision") for row in revisions
    ]


def test_pairs_of_the_same_texts_are_written_once_and_the_others_counted(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Four answers a prompt, of which three are alike: three comparisons have the same two texts.
    scripted(monkeypatch, lambda request: "Is it?" if request.id.endswith("/0") else "It is.")
    world.run(SAMPLE, SampleBlock())
    counts = world.run(COMPARE, CompareBlock(completions=4, limit=2)).counts

    assert (counts["decided"], counts["pairs"], counts["pairs_repeated"]) == (2 * 3, 2, 2 * 2)
    assert len(world.rows("compare/pairs.jsonl", PreferencePair)) == 2


def test_revisions_of_originals_that_were_cut_make_no_pair(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, reply)
    world.run(SAMPLE, SampleBlock.model_validate({"sampling": {"max_new_tokens": 1}}))
    world.run(REVISE, ReviseBlock(splits=("sft", "preference")))
    assert any(row.original_cut for row in world.rows("revise/revisions.jsonl", Revision))
    with pytest.raises(InputError, match=r"has a complete original \(.*revision_pairs_cut"):
        world.run(COMPARE, CompareBlock(revision_pairs=True))


def test_revision_pairs_need_revisions_of_the_preference_split(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, reply)
    world.run(SAMPLE, SampleBlock())
    world.run(REVISE, ReviseBlock())

    with pytest.raises(InputError, match=r"add it to `revise\.splits`"):
        world.run(COMPARE, CompareBlock(revision_pairs=True))


def oracle(request: ChoiceRequest, choice: str) -> float:
    """The log-probabilities of the letters from a judge that prefers the completion that ends with a question."""
    first = request.messages[0].content.split("(A) ")[1].split("\n\n(B) ")[0]
    return -0.2 if first.endswith("?") == (choice == "A") else -1.8


def test_a_choosing_judge_labels_after_it_passed_the_probes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, varied, oracle)
    world.shared["judge"] = JudgeBlock(kind="choice")
    world.run(SAMPLE, SampleBlock())
    outcome = world.run(COMPARE, CompareBlock())

    pairs = world.rows("compare/pairs.jsonl", PreferencePair)
    assert outcome.figures["judge"]["accuracy"] == 1.0
    assert outcome.figures["judge"]["n"] == 4
    assert pairs
    assert all(pair.chosen[0].content.endswith("?") and 0.5 < pair.probability < 1 for pair in pairs)


@pytest.mark.parametrize(("stage", "block"), [(REVISE, ReviseBlock()), (COMPARE, CompareBlock())])
def test_a_judge_at_chance_stops_the_stage_before_it_generates(
    world: World, monkeypatch: pytest.MonkeyPatch, stage: Stage, block: Any
) -> None:
    scripted(monkeypatch, varied)
    world.run(SAMPLE, SampleBlock())
    world.shared["judge"] = JudgeBlock(kind="choice")

    def never(request: Request) -> str:
        raise AssertionError("a completion was asked for")

    scripted(monkeypatch, never, lambda request, choice: -0.1 if choice == "A" else -3.0)
    with pytest.raises(JudgeAtChance, match="50% of 4 probes right"):
        world.run(stage, block)
    world.shared["judge"] = JudgeBlock(kind="choice", allow_chance=True)
    with pytest.raises(AssertionError, match="a completion was asked for"):
        world.run(stage, block)


def test_check_tells_what_the_constitution_lacks(world: World) -> None:
    Path(world.shared["constitution"]).write_text("title: x\nprinciples:\n  - {id: a, compare: Which?}\n")

    assert [text.split(":")[0] for text in REVISE.check(ReviseBlock(), world.shared)] == ["judge.kind", "constitution"]
    assert [text.split(":")[0] for text in COMPARE.check(CompareBlock(), world.shared)] == ["judge.kind"]
    assert load_constitution(world.shared["constitution"]).principles[0].requests is None
    world.shared["constitution"] = "missing.yaml"
    assert REVISE.check(ReviseBlock(), world.shared) == COMPARE.check(CompareBlock(), world.shared) == []


def test_a_critic_that_would_write_nothing_is_reported(world: World) -> None:
    block = ReviseBlock.model_validate({"critique": False, "critic": {"model": "other"}})
    assert REVISE.check(block, world.shared) == [
        "revise.critic: has no effect with `critique: false`; remove one of the two"
    ]


def test_check_tells_shares_that_do_not_add_up(world: World) -> None:
    prompts = world.shared["prompts"].model_dump() | {"split": {"sft": 0.9}}

    [told] = SAMPLE.check(SampleBlock(), {"prompts": PromptsBlock.model_validate(prompts)})
    assert told.startswith("prompts.split: the shares of sft, preference, rl, eval add up to 1.6")


def outputs(folder: Path, stage: Stage) -> dict[str, str]:
    """The digests of those outputs that the stage wrote."""
    return output_digests(folder, [name for name in stage.outputs if (folder / name).exists()])


def dying(text: Callable[[Request], str], after: int) -> Callable[[Request], str]:
    left = [after]

    def answer(request: Request) -> str:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return text(request)

    return answer


@pytest.mark.parametrize("death", [0, 1, 5, 9])
def test_interrupted_stages_resume_to_the_result_of_uninterrupted_ones(
    world: World, monkeypatch: pytest.MonkeyPatch, death: int
) -> None:
    blocks = [
        (SAMPLE, SampleBlock.model_validate({"sampling": {"batch_size": 3}})),
        (REVISE, ReviseBlock.model_validate({"sampling": {"batch_size": 3}, "rounds": 2})),
        (COMPARE, CompareBlock.model_validate({"sampling": {"batch_size": 3}})),
    ]
    for stage, block in blocks:
        scripted(monkeypatch, dying(lambda request: reply(request) + varied(request), death))
        with pytest.raises(KeyboardInterrupt):
            world.run(stage, block)
        scripted(monkeypatch, lambda request: reply(request) + varied(request))
        world.run(stage, block)
        world.run(stage, block, output=f"{stage.name}-undisturbed")

        ended, undisturbed = world.root / stage.name, world.root / f"{stage.name}-undisturbed"
        assert outputs(ended, stage) == outputs(undisturbed, stage)


KILLED = """\
import sys
from pathlib import Path
from tests.stages.test_sample_revise_compare import World, tiny_sample
world = World(Path(sys.argv[1]), Path(sys.argv[2]))
tiny_sample(world, sys.argv[3], "killed")
"""


def tiny_sample(world: World, model: str, output: str) -> Outcome:
    """The sample stage with a real model, in chunks of three."""
    world.shared["model"] = ModelBlock(path=model, precision="fp32")
    sampling = {"max_new_tokens": 48, "batch_size": 3}
    return world.run(SAMPLE, SampleBlock.model_validate({"sampling": sampling}), output)


def test_sampling_from_a_model_resumes_after_a_kill_to_the_same_bytes(
    world: World, tiny_model_dir: Path, tiny_prompts: Path
) -> None:
    undisturbed = tiny_sample(world, str(tiny_model_dir), "undisturbed")
    command = [sys.executable, "-c", KILLED, str(world.root), str(tiny_prompts), str(tiny_model_dir)]
    # The process needs what pytest adds to the path.
    path = os.pathsep.join(sys.path)
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2], env={**os.environ, "PYTHONPATH": path})
    journal = world.root / "killed" / "windows" / "000001" / "samples.journal.0"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if journal.exists() and journal.stat().st_size > 0:
            os.kill(process.pid, signal.SIGKILL)
            break
        time.sleep(0.005)
    process.wait()

    kept = [json.loads(line) for line in journal.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    assert kept
    resumed = tiny_sample(world, str(tiny_model_dir), "killed")
    assert resumed.counts == undisturbed.counts
    assert output_digests(world.root / "killed", SAMPLE.outputs) == output_digests(
        world.root / "undisturbed", SAMPLE.outputs
    )


def test_a_tiny_model_judges_by_contrast(world: World, tiny_model_dir: Path) -> None:
    """Real scores are finite and soft, and exactly opposite when the completions are exchanged."""
    from align.feedback.judge import open_judge
    from align.feedback.probes import examine_judge

    constitution = load_constitution(world.shared["constitution"])
    block = JudgeBlock(kind="contrast", min_margin=0.0)
    judge = open_judge(block, ModelBlock(path=str(tiny_model_dir), precision="fp32"), constitution)
    talk = (Message("user", "Hello."),)
    [there] = judge.compare([("x", talk, "Is it?", "It is.", "")])
    [back] = judge.compare([("x", talk, "It is.", "Is it?", "")])

    assert there.p_a is not None and back.p_a is not None
    assert 0 < there.p_a < 1
    assert back.p_a == 1 - there.p_a
    assert examine_judge(judge).n == 4


def human_pairs(path: Path, better: str, worse: str, count: int = 20) -> dict[str, Any]:
    rows = [{"prompt": f"Tell me {n}", "chosen": better, "rejected": worse} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"human": [{"path": str(path)}]}


def test_a_judge_that_people_disagree_with_labels_nothing_unless_it_may(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, reply)
    world.run(SAMPLE, SampleBlock(splits=("sft",)))
    against = human_pairs(world.root / "human.jsonl", "It is.", "Is it?")
    settings = CompareBlock.model_validate({"calibration": against})
    with pytest.raises(JudgeAtChance, match="prefers what people prefer in 0% of the 20 pairs"):
        world.run(COMPARE, settings)
    assert not (world.root / "compare/pairs.jsonl").exists()

    world.shared["judge"] = JudgeBlock(kind="rule", allow_chance=True)
    assert world.run(COMPARE, settings).figures["calibration"]["accuracy"]["mean"] == 0.0


def test_a_judge_that_agrees_with_people_labels_and_its_figures_are_kept(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted(monkeypatch, reply)
    world.run(SAMPLE, SampleBlock(splits=("sft",)))
    pairs = human_pairs(world.root / "human.jsonl", "Is it?", "It is.")
    outcome = world.run(COMPARE, CompareBlock.model_validate({"calibration": {**pairs, "min_accuracy": 0.7}}))
    assert outcome.figures["calibration"]["accuracy"]["mean"] == 1.0
    assert outcome.figures["calibration"]["read"]["pairs_human"] == 20
    assert "test, rule: 20 pairs of 20 prompts" in capsys.readouterr().out
    rows = world.rows("compare/calibration.jsonl", JudgedPair)
    assert {round(row.p_chosen, 3) for row in rows} == {0.982}
