"""Runs with an early stop end the same, to the byte, whether or not they are interrupted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align.rl.early_stop import Ending
from align.rl.ppo import PpoTrainer
from align.rl.settings import EarlyStopBlock, WatchBlock
from align.settings.blocks import LoraBlock, OptimizerBlock
from tests.rl.tiny_ppo import build_trainer, settings, share_of_letters
from tests.stages.training import same

TURN = 6
"""The iteration from which the reward punishes letters."""
WRITTEN = ("metrics.jsonl", "rollouts.jsonl", "alarms.jsonl")


class Interrupted(Exception):
    pass


class Turning:
    """A reward that reverses its sign at `TURN`, and may interrupt the run; `done` iterations came before it."""

    def __init__(self, done: int = 0, interrupt: int | None = None) -> None:
        self.iteration = done
        self.interrupt = interrupt

    def __call__(self, responses: Any) -> Any:
        self.iteration += 1
        if self.iteration == self.interrupt:
            raise Interrupted
        letters = share_of_letters(responses)
        return letters if self.iteration < TURN else -letters


def watched(**changes: Any) -> Any:
    plain = {
        "iterations": 30,
        "rollout_batch": 16,
        "optimizer": OptimizerBlock(learning_rate=3e-3, batch_size=16, micro_batch_size=16, schedule="constant"),
        "checkpoint_every": 2,
        "kl_target": 1.0,
        "early_stop": EarlyStopBlock(window=2, patience=4),
        "watch": WatchBlock(window=2, repeat_after=3, sampling_gap=1e-12),
        "sample_table_every": None,
    }
    return settings(**{**plain, **changes})


def trained(model_dir: Path, output: Path, block: Any, **options: Any) -> PpoTrainer:
    trainer = build_trainer(model_dir, output, block, **options)
    trainer.train()
    return trainer


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def checkpoints(output: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("iteration-")) for path in (output / "checkpoint").iterdir())


@pytest.mark.parametrize("lora", [None, LoraBlock(r=4)], ids=["every weight", "adapters"])
def test_a_run_whose_reward_turns_is_stopped_and_leaves_the_policy_from_before(
    tiny_model_dir: Path, tmp_path: Path, lora: LoraBlock | None
) -> None:
    stopped = trained(tiny_model_dir, tmp_path / "stopped", watched(), reward=Turning(), lora=lora)
    ending = stopped.ending
    assert ending is not None and ending.stopped is not None
    assert TURN <= ending.iteration < 30
    assert checkpoints(tmp_path / "stopped") == [ending.published, ending.iteration]
    metrics = rows(tmp_path / "stopped/metrics.jsonl")
    scores = {row["step"]: row["score"] for row in metrics}
    best = max(range(2, ending.iteration, 2), key=lambda saved: scores[saved] + scores[saved + 1])
    assert ending.published == best < TURN
    assert [row["step"] for row in metrics] == list(range(1, ending.iteration + 1))
    assert rows(tmp_path / "stopped/alarms.jsonl")[-1] == {
        "iteration": ending.iteration,
        "alarm": "early_stop",
        "sentence": ending.sentence,
    }
    assert metrics[-1]["alarm/early_stop"] == 1 and "alarm/early_stop" not in metrics[-2]

    short = watched(iterations=ending.published, early_stop=None)
    straight = trained(tiny_model_dir, tmp_path / "straight", short, reward=Turning(), lora=lora)
    assert same(stopped.policy_state(), straight.policy_state())
    assert stopped.last_figures == straight.last_figures


@pytest.fixture(scope="module")
def uninterrupted(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> PpoTrainer:
    return trained(tiny_model_dir, tmp_path_factory.mktemp("uninterrupted"), watched(), reward=Turning())


def assert_same_run(one: PpoTrainer, two: PpoTrainer) -> None:
    for name in WRITTEN:
        assert (one.output / name).read_bytes() == (two.output / name).read_bytes(), name
    assert one.ending == two.ending
    assert one.last_figures == two.last_figures
    assert checkpoints(one.output) == checkpoints(two.output)
    assert same(one.policy_state(), two.policy_state())


@pytest.mark.parametrize("moment", [2, 5, TURN + 2])
def test_an_interrupted_run_stops_where_an_uninterrupted_one_does(
    uninterrupted: PpoTrainer, tiny_model_dir: Path, tmp_path: Path, moment: int
) -> None:
    with pytest.raises(Interrupted):
        trained(tiny_model_dir, tmp_path, watched(), reward=Turning(interrupt=moment))
    done = max([0, *checkpoints(tmp_path)]) if (tmp_path / "checkpoint").exists() else 0
    assert_same_run(trained(tiny_model_dir, tmp_path, watched(), reward=Turning(done)), uninterrupted)


def cut_short(monkeypatch: pytest.MonkeyPatch, method: str, when: Callable[[PpoTrainer], bool]) -> None:
    """Interrupt the trainer before it runs one of its methods."""
    whole = getattr(PpoTrainer, method)

    def interrupted(self: PpoTrainer, *arguments: Any) -> Any:
        if when(self):
            raise Interrupted
        return whole(self, *arguments)

    monkeypatch.setattr(PpoTrainer, method, interrupted)


@pytest.mark.parametrize("method", ["_save", "_restore"])
def test_a_run_interrupted_after_its_stop_trains_no_further(
    uninterrupted: PpoTrainer, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Interrupted before the last checkpoint is saved, and before the best one is restored."""
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        cut_short(patch, method, lambda trainer: trainer.ending is not None)
        trained(tiny_model_dir, tmp_path, watched(), reward=Turning())
    done = checkpoints(tmp_path)[-1]
    assert uninterrupted.ending is not None
    assert (done == uninterrupted.ending.iteration) == (method == "_restore")
    resumed = trained(tiny_model_dir, tmp_path, watched(), reward=Turning(done))
    assert_same_run(resumed, uninterrupted)
    assert_same_run(trained(tiny_model_dir, tmp_path, watched(), reward=None), uninterrupted)


def test_a_checkpoint_that_a_kill_kept_from_being_removed_changes_nothing(
    uninterrupted: PpoTrainer, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr("align.rl.monitoring.Watch.worth_keeping", lambda self, saved: saved)
        trained(tiny_model_dir, tmp_path, watched(), reward=Turning(interrupt=TURN + 1))
    assert checkpoints(tmp_path) == [2, 4, 6]
    assert_same_run(trained(tiny_model_dir, tmp_path, watched(), reward=Turning(6)), uninterrupted)


def test_a_run_stops_for_its_kl_and_may_keep_its_last_policy(tiny_model_dir: Path, tmp_path: Path) -> None:
    rule = EarlyStopBlock(window=1, kl_above=0.05, roll_back=False)
    trainer = trained(tiny_model_dir, tmp_path, watched(early_stop=rule))
    kl = [row["kl_to_reference_k1"] for row in rows(tmp_path / "metrics.jsonl")]
    assert kl[-1] > 0.05 >= max(kl[:-1])
    assert trainer.ending is not None and trainer.ending.published == trainer.ending.iteration == len(kl) < 30
    assert checkpoints(tmp_path)[-1] == len(kl), "a resumed run finds that it had ended"


def test_a_completed_run_may_still_publish_its_best_checkpoint(tiny_model_dir: Path, tmp_path: Path) -> None:
    block = watched(iterations=TURN + 3, early_stop=EarlyStopBlock(window=1))
    trainer = trained(tiny_model_dir, tmp_path, block, reward=Turning())
    assert trainer.ending is not None and trainer.ending.stopped is None
    assert trainer.ending.published < TURN
    [row] = [row for row in rows(tmp_path / "alarms.jsonl") if row["alarm"] == "roll_back"]
    assert row["sentence"] == trainer.ending.sentence


def test_a_run_without_a_rule_keeps_one_checkpoint_and_its_last_policy(tiny_model_dir: Path, tmp_path: Path) -> None:
    trainer = trained(tiny_model_dir, tmp_path, watched(iterations=4, early_stop=None), reward=Turning())
    assert trainer.ending == Ending(4, None, 4)
    assert checkpoints(tmp_path) == [4]


def test_alarms_are_repeated_after_a_while_and_mark_their_iterations(
    uninterrupted: PpoTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    reported = [
        row["iteration"] for row in rows(uninterrupted.output / "alarms.jsonl") if row["alarm"] == "sampling_gap"
    ]
    assert reported[:3] == [2, 5, 8]
    marked = [row["step"] for row in rows(uninterrupted.output / "metrics.jsonl") if "alarm/sampling_gap" in row]
    assert marked == reported
