"""What `group_relative` trains on where a prompt's completions have equal scores, on a tiny random model.

    python -m benchmarks.equal_scores

The reward is 1 for a completion that begins with a lower-case letter and 0 for any other, so that soon all completions
of most prompts have the same score. Three runs from the same seed: with scores and KL penalties standardised together,
with scores alone standardised, and with the KL in the loss. Prints a Markdown table by windows of iterations.
"""

import argparse
import contextlib
import io
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.rl.advantages import group_relative_advantages, groups_of_equals
from align.rl.experience import Collector, Experience
from align.settings.blocks import OptimizerBlock
from tests.rl.tiny_ppo import build_trainer, settings
from tests.tiny import build_tiny_model

GROUPS, SIBLINGS = 8, 8
COLUMNS = ("equal_groups", "equal_rms", "mixed_rms", "score", "kl")


class RecordingCollector(Collector):
    """Records the advantages of groups with equal and with mixed scores."""

    def collect(self, iteration: int, kl_coef: float) -> Experience:
        experience = super().collect(iteration, kl_coef)
        equal = groups_of_equals(experience.scores, GROUPS)
        squares = experience.advantages[:, 0].view(GROUPS, SIBLINGS).square().mean(dim=1)
        figures = {
            "equal_groups": float(equal.float().mean()),
            "equal_rms": float(squares[equal].mean().sqrt()) if equal.any() else float("nan"),
            "mixed_rms": float(squares[~equal].mean().sqrt()) if not equal.all() else float("nan"),
            "score": float(experience.raw_scores.mean()),
            "kl": float(experience.kl["k1"].mean()),
        }
        RECORDED.append(figures)
        return experience


class TotalsCollector(RecordingCollector):
    """Standardises total rewards, KL penalties included."""

    def _advantages(self, rewards: Tensor, scores: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        totals = rewards.sum(dim=1)
        each = group_relative_advantages(totals, torch.zeros_like(totals), GROUPS)
        return each[:, None] * mask, torch.zeros_like(rewards)


RECORDED: list[dict[str, float]] = []
RUNS: dict[str, tuple[type[RecordingCollector], dict[str, Any]]] = {
    "scores and penalties together": (TotalsCollector, {}),
    "scores alone": (RecordingCollector, {}),
    "scores alone, k3 in the loss": (RecordingCollector, {"kl_estimator": "k3"}),
}


def begins_lower(_: Sequence[Any], completions: Sequence[str]) -> Tensor:
    """1 for a completion that begins with a lower-case letter, otherwise 0."""
    return torch.tensor([float("a" <= text[:1] <= "z") for text in completions])


def train(collector: type[RecordingCollector], changes: dict[str, Any], iterations: int) -> list[dict[str, float]]:
    """Each iteration's figures."""
    RECORDED.clear()
    block = settings(
        iterations=iterations,
        rollout_batch=GROUPS,
        completions_per_prompt=SIBLINGS,
        advantage="group_relative",
        epochs=2,
        kl_coef=0.05,
        score={"normalise": "none", "clip": None},
        optimizer=OptimizerBlock(learning_rate=3e-3, batch_size=64, micro_batch_size=64, schedule="constant"),
        sample_table_every=None,
        **changes,
    )
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        model = build_tiny_model(Path(folder) / "model")
        trainer = build_trainer(model, Path(folder) / "run", block, reward=begins_lower)
        trainer.collector = collector(**vars(trainer.collector))
        trainer.train()
    return list(RECORDED)


def table_rows(name: str, figures: Sequence[dict[str, float]], window: int) -> list[str]:
    """A Markdown row per window of iterations."""
    rows = []
    for start in range(0, len(figures), window):
        part = figures[start : start + window]
        known = {column: [row[column] for row in part if row[column] == row[column]] for column in COLUMNS}
        share, *others = (statistics.mean(values) if values else float("nan") for values in known.values())
        cells = [f"{share:.0%}", *(f"{value:.2f}" for value in others)]
        rows.append(f"| {name} | {start + 1}-{start + len(part)} | {' | '.join(cells)} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=48)
    parser.add_argument("--window", type=int, default=12)
    arguments = parser.parse_args()
    print("| standardised | iterations | groups of equal scores | RMS advantage there | elsewhere | score | KL, nats |")
    print("|---|---|---|---|---|---|---|")
    for name, (collector, changes) in RUNS.items():
        print(
            *table_rows(name, train(collector, changes, arguments.iterations), arguments.window), sep="\n", flush=True
        )


if __name__ == "__main__":
    main()
