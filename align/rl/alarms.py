"""Alarms about a PPO run: pure functions of its figures so far.

Every alarm compares windows of iterations, by their medians or by all pairs of an iteration of one window and one of
the other, so that no single noisy iteration fires one. An alarm has the name of its threshold's key in `ppo.watch`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from align.rl.metric_history import KL, History, values
from align.rl.settings import WatchBlock

SCORE, CONTROLLED = "score", "score_length_controlled"
KL_FLOOR = 5.0
"""Nats per completion; a smaller KL may multiply just because it starts from 0."""
CLEAR = 0.95
"""A figure has clearly risen if it is higher in this share of the pairs of an earlier and a newer iteration."""
FLAT = 0.75
"""A figure has not risen if it is higher in at most this share of those pairs."""


@dataclass(frozen=True)
class Alarm:
    """An alarm's name, or `early_stop` or `roll_back`, and one sentence that says what happened and what to do."""

    name: str
    sentence: str


@dataclass(frozen=True)
class WatchedRun:
    """A run's figures so far in windows of iterations, which are counted back from the newest one.

    Args:
        block: the thresholds.
        gold: the gold sources' names.
    """

    history: History
    block: WatchBlock
    gold: Sequence[str] = ()

    @property
    def full_windows(self) -> int:
        """The number of full windows."""
        return len(self.history) // self.block.window

    def window(self, name: str, back: int = 0) -> list[float]:
        """A figure's values in a window: 0 is the newest, 1 the one before it."""
        end = len(self.history) - back * self.block.window
        return values(self.history[max(end - self.block.window, 0) : end], name)

    def window_median(self, name: str, back: int = 0) -> float | None:
        """A figure's median in a window; None if the window is not full, or lacks the figure."""
        return median(found) if self.full_windows > back and (found := self.window(name, back)) else None

    def first_window(self, name: str) -> list[float]:
        """A figure's values in the run's first window; empty while the newest window overlaps it."""
        return values(self.history[: self.block.window], name) if self.full_windows > 1 else []

    def iterations(self, back: int) -> str:
        """Names a window's iterations."""
        end = len(self.history) - back * self.block.window
        return f"iterations {end - self.block.window + 1} to {end}"


def fired(run: WatchedRun) -> list[Alarm]:
    """The alarms that fire in the newest iteration, except those that fired in the last `repeat_after` iterations."""
    recent = run.history[-run.block.repeat_after : -1]
    quiet = [check for check in CHECKS if not values(recent, f"alarm/{check.__name__}")]
    return [Alarm(check.__name__, sentence) for check in quiet if (sentence := check(run))]


def higher_share(later: Sequence[float], earlier: Sequence[float]) -> float:
    """Share of pairs whose later value is higher; ties count half (Mann and Whitney 1947: U over its range)."""
    pairs = [(new > old) + (new == old) / 2 for new in later for old in earlier]
    return sum(pairs) / len(pairs) if pairs else 0.5


def rose_by(limit: float, later: Sequence[float], earlier: Sequence[float]) -> bool:
    """Whether a figure clearly rose, and its median by more than `limit`; False if a window is empty."""
    return higher_share(later, earlier) >= CLEAR and median(later) - median(earlier) > limit


def kl_limit(run: WatchedRun) -> str | None:
    """The policy is far from the reference."""
    limit, kl = run.block.kl_limit, run.window_median(KL)
    if limit is None or kl is None or kl <= limit:
        return None
    return (
        f"the policy is {kl:.3g} nats per completion from the reference, over ppo.watch.kl_limit {limit:g}: "
        "raise ppo.kl_coef or set ppo.kl_target, or lower ppo.optimizer.learning_rate"
    )


def kl_growth(run: WatchedRun) -> str | None:
    """The KL to the reference grows by a multiple from one window to the next."""
    factor, kl, before = run.block.kl_growth, run.window_median(KL), run.window_median(KL, back=1)
    if factor is None or kl is None or before is None or run.full_windows < 3:  # the first window starts at KL 0
        return None
    if kl < KL_FLOOR or kl <= factor * before:
        return None
    return (
        f"the KL to the reference grows ever faster: {kl:.3g} nats per completion after {before:.3g} in the "
        f"{run.block.window} iterations before: raise ppo.kl_coef, or lower ppo.optimizer.learning_rate"
    )


def entropy_collapse(run: WatchedRun) -> str | None:
    """The policy has become nearly certain of every token."""
    share, new, first = run.block.entropy_collapse, run.window("entropy"), run.first_window("entropy")
    if share is None or not (new and first) or median(new) >= share * median(first):
        return None
    return (
        f"the policy's entropy has collapsed to {median(new):.3g} nats per token from {median(first):.3g}, so it "
        "no longer explores: lower ppo.optimizer.learning_rate or ppo.epochs, or raise ppo.kl_coef"
    )


def length_hacking(run: WatchedRun) -> str | None:
    """The score rises, but little or nothing of the rise is left at equal length."""
    if run.block.length_hacking is None:
        return None
    for back in _windows_before_a_rise(run):
        rise = median(run.window(SCORE)) - median(run.window(SCORE, back))
        new, old = run.window(CONTROLLED), run.window(CONTROLLED, back)
        controlled = median(new) - median(old)
        if controlled <= (1 - run.block.length_hacking) * rise and higher_share(new, old) <= FLAT:
            return (
                f"since {run.iterations(back)} the score rose by {rise:.3g}, but by {controlled:.3g} at equal "
                "length: the policy learns to write longer or shorter, not better; set ppo.length_penalty, or train "
                "the reward on pairs of similar length"
            )
    return None


def gold_fall(run: WatchedRun) -> str | None:
    """The score rises while a gold source's score falls (over-optimisation, Gao et al. 2022, arXiv 2210.10760)."""
    if run.block.gold_fall is None:
        return None
    for back in _windows_before_a_rise(run):
        for source in run.gold:
            new, old = (run.window(f"score/{source}", each) for each in (0, back))
            if higher_share(old, new) >= run.block.gold_fall:
                return (
                    f"since {run.iterations(back)} the score rose while the gold score '{source}' fell from "
                    f"{median(old):.3g} to {median(new):.3g}: the reward is over-optimised; stop here (ppo.early_stop "
                    f"on score/{source}), raise ppo.kl_coef, or add reward sources"
                )
    return None


def repetition_rise(run: WatchedRun) -> str | None:
    """Completions repeat themselves more than in the first window."""
    limit, new, first = run.block.repetition_rise, run.window("repetition"), run.first_window("repetition")
    if limit is None or not rose_by(limit, new, first):
        return None
    return (
        f"completions repeat themselves: {median(new):.0%} of their n-grams are repetitions, "
        f"{median(first):.0%} at first: look at the samples, and raise ppo.kl_coef or penalise it by a reward source"
    )


def value_failure(run: WatchedRun) -> str | None:
    """After the warm-up, the values predict the returns no better than a constant does."""
    limit, explained = run.block.value_failure, run.window_median("explained_variance")
    warm = len(run.history) >= run.block.value_warmup + run.block.window
    if limit is None or explained is None or not warm or explained >= limit:
        return None
    return (
        f"the values explain nothing of the returns (explained variance {explained:.2f}), which makes advantages "
        "noisier than without values: raise ppo.value_coef or ppo.epochs, or set ppo.advantage leave_one_out"
    )


def sampling_gap(run: WatchedRun) -> str | None:
    """Sampling and training compute different log-probs of the same tokens."""
    limit, gap = run.block.sampling_gap, run.window_median("sampling_gap")
    if limit is None or gap is None or gap <= limit:
        return None
    return (
        f"log-probs of sampling and training differ by {gap:.2g} nats per token, over ppo.watch.sampling_gap "
        f"{limit:g}: the policy that is trained is not the one that samples; set model.precision fp32"
    )


def stopped_fall(run: WatchedRun) -> str | None:
    """Fewer completions end with a stop token than in the first window."""
    limit, new, first = run.block.stopped_fall, run.window("stopped_share"), run.first_window("stopped_share")
    if limit is None or not rose_by(limit, first, new):
        return None
    return (
        f"only {median(new):.0%} of the completions end with a stop token, {median(first):.0%} at first: raise "
        "ppo.missing_eos_penalty or ppo.sampling.max_new_tokens"
    )


def _windows_before_a_rise(run: WatchedRun) -> Iterator[int]:
    """Yields the earlier windows, latest first, since which the score has clearly risen."""
    for back in range(1, run.full_windows):
        if higher_share(run.window(SCORE), run.window(SCORE, back)) >= CLEAR:
            yield back


CHECKS = (
    kl_limit,
    kl_growth,
    entropy_collapse,
    length_hacking,
    repetition_rise,
    gold_fall,
    value_failure,
    sampling_gap,
    stopped_fall,
)
