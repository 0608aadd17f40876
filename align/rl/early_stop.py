"""Decides when a run ends and which iteration's policy it publishes: pure functions of figures and checkpoints.

An iteration's figures describe completions sampled before its updates. So a checkpoint is judged by the moving mean
that ends with the next iteration, whose completions its policy wrote.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from align.rl.metric_history import KL, History, moving_means
from align.rl.settings import EarlyStopBlock


@dataclass(frozen=True)
class Ending:
    """How a run ended: its last iteration, why it stopped early (None if it did not), and whose policy is published."""

    iteration: int
    stopped: str | None
    published: int

    @property
    def sentence(self) -> str:
        """Describes an early stop or a roll-back; empty if all iterations were run and the last policy is published."""
        if self.stopped is None and self.published == self.iteration:
            return ""
        why = f" because {self.stopped}" if self.stopped else ""
        whose = f"the policy of iteration {self.published}, the best checkpoint,"
        if self.published == self.iteration:
            whose = "its last policy"
        return f"the run ended after iteration {self.iteration}{why}; {whose} is published"


def ending(
    history: History, saved: Sequence[int], iteration: int, iterations: int, block: EarlyStopBlock | None
) -> Ending | None:
    """How the run ends after `iteration`, or None if it continues. `saved` iterations have or get a checkpoint."""
    reason = stop_reason(history, block) if block is not None else None
    if reason is None and iteration < iterations:
        return None
    rolls_back = block is not None and block.roll_back
    return Ending(iteration, reason, best_checkpoint(history, saved, block) if block and rolls_back else iteration)


def stop_reason(history: History, block: EarlyStopBlock) -> str | None:
    """Why the run should stop after the newest iteration, or None."""
    over = f"over {block.window} iterations"
    kl = moving_means(history, KL, block.window)
    if block.kl_above is not None and kl and kl[max(kl)] > block.kl_above:
        return f"the KL to the reference was {kl[max(kl)]:.3g} nats a completion {over}, above {block.kl_above:g}"
    means = moving_means(history, block.figure, block.window)
    if block.patience is None or not means:
        return None
    newest, best = max(means), max(means, key=lambda iteration: means[iteration])
    if newest - best < block.patience:
        return None
    return (
        f"{block.figure} {over} has had no new best for {newest - best} iterations "
        f"({means[best]:.3g} at iteration {best}, {means[newest]:.3g} now)"
    )


def best_checkpoint(history: History, saved: Sequence[int], block: EarlyStopBlock) -> int:
    """The iteration of the checkpoint with the highest mean within `kl_above`; the newest if none can be judged.

    Args:
        saved: iterations that have a checkpoint, ascending, at least one. If no iteration followed a checkpoint, it is
            judged by the mean that ends with its own.
    """
    means = moving_means(history, block.figure, block.window)
    kl = moving_means(history, KL, block.window)
    limit = float("inf") if block.kl_above is None else block.kl_above
    judged_at = {iteration: iteration + 1 if iteration + 1 in means else iteration for iteration in saved}
    eligible = [iteration for iteration in saved if judged_at[iteration] in means and kl[judged_at[iteration]] <= limit]
    return max(eligible, key=lambda iteration: means[judged_at[iteration]], default=saved[-1])
