"""The tables of docs/ppo.md name what a run logs, no more and no less."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from align.rl.alarms import CHECKS
from align.rl.reward_sources import JudgeReward
from align.rl.rewards import Response, RewardSource
from align.rl.rollout import Completion
from align.rl.settings import WatchBlock
from tests.rl.tiny_ppo import build_trainer, settings, share_of_letters

DOCUMENT = (Path(__file__).parents[2] / "docs/ppo.md").read_text(encoding="utf-8")


def table(heading: str) -> list[list[str]]:
    """The cells, by row, of the table whose first column has this heading."""
    [text] = re.findall(rf"^\| {heading} \|.*\n\|[-|]+\|\n((?:\|.*\|\n)+)", DOCUMENT, re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


def documented(heading: str) -> dict[str, str]:
    """{name, with parts in angle brackets as patterns: healthy range}."""
    names = {name: row[-1] for row in table(heading) for name in re.findall(r"`([^`]+)`", row[0])}
    return {re.sub(r"<\w+>", r"\\w+", name): healthy for name, healthy in names.items()}


class Cutting:
    """A reward that shortens some prompts."""

    def __call__(self, responses: Sequence[Response]) -> torch.Tensor:
        return share_of_letters(responses)

    def take_cut(self) -> int:
        return 2


@pytest.fixture(scope="module")
def run(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything that adds figures."""
    output = tmp_path_factory.mktemp("run")
    watch = WatchBlock(window=1, sampling_gap=1e-12)
    block = settings(
        iterations=2,
        rollout_batch=4,
        completions_per_prompt=2,
        epochs=2,
        ptx_coef=0.1,
        kl_estimator="k3",
        watch=watch,
        optimizer={"batch_size": 8},
    )
    gold = RewardSource("gold", share_of_letters, gold=True)
    abstains = JudgeReward(lambda prompts, texts: [None, *(len(text) for text in texts[1:])])
    sources = [RewardSource("one", Cutting()), RewardSource("two", abstains), gold]
    trainer = build_trainer(tiny_model_dir, output, block, sources=sources)
    words = tuple(trainer.tokenizer("the cat").input_ids)
    trainer.learner.demonstrations = [Completion(trainer.prompts[0], words, "the cat", True, ())]
    trainer.train()
    return output


@pytest.mark.parametrize(("file", "heading"), [("metrics.jsonl", "figure"), ("timings.jsonl", "timing")])
def test_every_figure_of_a_run_is_documented_with_its_healthy_range_and_no_other(
    run: Path, file: str, heading: str
) -> None:
    logged = {name for line in (run / file).read_text().splitlines() for name in json.loads(line)} - {"step"}
    patterns = documented(heading)
    assert {name for name in logged if not any(re.fullmatch(pattern, name) for pattern in patterns)} == set()
    assert {pattern for pattern in patterns if not any(re.fullmatch(pattern, name) for name in logged)} == set()
    assert all(patterns.values())


def test_every_phase_that_is_timed_is_documented(run: Path) -> None:
    row = json.loads((run / "timings.jsonl").read_text().splitlines()[0])
    phases = {name.removeprefix("seconds_") for name in row if name.startswith("seconds_")}
    [described] = [row[1] for row in table("timing") if "seconds_<phase>" in row[0] and "per" not in row[0]]
    assert set(re.findall(r"`(\w+)`", described)) == phases


def test_every_alarm_is_documented_with_its_default() -> None:
    documented_defaults = {row[0].strip("`"): float(row[1]) for row in table("alarm")}
    assert documented_defaults == {check.__name__: getattr(WatchBlock(), check.__name__) for check in CHECKS}


def test_without_a_value_no_figure_of_one_is_logged(tiny_model_dir: Path, tmp_path: Path) -> None:
    siblings = {"advantage": "leave_one_out", "rollout_batch": 4, "completions_per_prompt": 2}
    block = settings(iterations=1, optimizer={"batch_size": 8}, **siblings)
    figures = build_trainer(tiny_model_dir, tmp_path, block).train()
    assert not {name for name in figures if name.startswith("value") or name == "explained_variance"}
    assert figures["advantage_mean"] == pytest.approx(0, abs=1e-6), "siblings' advantages cancel"
