"""When a run ends, and whose policy it leaves: pure functions of its figures and of which checkpoints there are.

A row's figures are those of completions that the policy wrote before that iteration's updates. So a checkpoint is
judged by the moving mean that ends with the next iteration, whose rollout its policy wrote.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from align.rl.metric_history import KL, History, moving_means
from align.rl.settings import EarlyStopBlock


@dataclass(frozen=True)
class Ending:
    """A run's end: after how many iterations, why before its last (None: it ran through), whose policy it leaves."""

    iteration: int
    stopped: str | None
    published: int

    @property
    def sentence(self) -> str:
        """What there is to tell; empty where the run went through and its last policy is left."""
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
    """The run's end, if `iteration` is its last of `iterations`; `saved` are the checkpoints there are or will be."""
    reason = stop_reason(history, block) if block is not None else None
    if reason is None and iteration < iterations:
        return None
    rolls_back = block is not None and block.roll_back
    return Ending(iteration, reason, best_checkpoint(history, saved, block) if block and rolls_back else iteration)


def stop_reason(history: History, block: EarlyStopBlock) -> str | None:
    """Why the run is to stop after the newest iteration, or None."""
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
    """The checkpoint with the highest mean, of those within `kl_above`; the newest where none was measured.

    Args:
        saved: iterations after which there is a checkpoint, ascending, at least one. One that no iteration followed is
            judged by the mean up to it.
    """
    means = moving_means(history, block.figure, block.window)
    kl = moving_means(history, KL, block.window)
    limit = float("inf") if block.kl_above is None else block.kl_above
    judged = {iteration: iteration + 1 if iteration + 1 in means else iteration for iteration in saved}
    measured = [iteration for iteration in saved if judged[iteration] in means and kl[judged[iteration]] <= limit]
    return max(measured, key=lambda iteration: means[judged[iteration]], default=saved[-1])
