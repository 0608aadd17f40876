"""What is wrong with a PPO run, told from its figures: pure functions of the rows so far.

Every alarm looks at windows of iterations, by their medians or by all pairs of an iteration of one and one of the
other, so that a single noisy iteration fires none. Its name is the key of `ppo.watch` that is its threshold.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from align.rl.metric_history import KL, History, values
from align.rl.settings import WatchBlock

SCORE, CONTROLLED = "score", "score_length_controlled"
KL_FLOOR = 5.0
"""Nats a completion below which a KL that grows by multiples is only leaving 0."""
CLEAR = 0.95
"""Share of the pairs of an earlier and a new iteration in which a figure that clearly rose is higher in the new one."""
FLAT = 0.75
"""The same share of a figure that cannot be said to have risen."""


@dataclass(frozen=True)
class Alarm:
    """A name (`early_stop` and `roll_back` besides the alarms') and one plain sentence."""

    name: str
    sentence: str


@dataclass(frozen=True)
class Seen:
    """The rows so far in windows counted back from the newest, the thresholds, and the gold sources' names."""

    history: History
    block: WatchBlock
    gold: Sequence[str] = ()

    @property
    def windows(self) -> int:
        """How many whole windows there are."""
        return len(self.history) // self.block.window

    def window(self, name: str, back: int = 0) -> list[float]:
        """A figure in a window: 0 is the newest, 1 the one before it."""
        end = len(self.history) - back * self.block.window
        return values(self.history[max(end - self.block.window, 0) : end], name)

    def level(self, name: str, back: int = 0) -> float | None:
        """The median of a window that is whole, or None."""
        return median(found) if self.windows > back and (found := self.window(name, back)) else None

    def first(self, name: str) -> list[float]:
        """A figure in the first window; empty where the newest reaches into it."""
        return values(self.history[: self.block.window], name) if self.windows > 1 else []

    def iterations(self, back: int) -> str:
        """A window's iterations in words."""
        end = len(self.history) - back * self.block.window
        return f"iterations {end - self.block.window + 1} to {end}"


def fired(seen: Seen) -> list[Alarm]:
    """The alarms that fire in the newest iteration: those that hold and have not fired lately."""
    lately = seen.history[-seen.block.repeat_after : -1]
    quiet = [check for check in CHECKS if not values(lately, f"alarm/{check.__name__}")]
    return [Alarm(check.__name__, sentence) for check in quiet if (sentence := check(seen))]


def higher_share(later: Sequence[float], earlier: Sequence[float]) -> float:
    """Share of pairs whose later value is the higher, ties half (Mann and Whitney 1947: U over its range)."""
    pairs = [(new > old) + (new == old) / 2 for new in later for old in earlier]
    return sum(pairs) / len(pairs) if pairs else 0.5


def rose_by(limit: float, later: Sequence[float], earlier: Sequence[float]) -> bool:
    """Whether a figure clearly rose, its median by more than `limit`; False where a window is empty."""
    return higher_share(later, earlier) >= CLEAR and median(later) - median(earlier) > limit


def kl_limit(seen: Seen) -> str | None:
    """The policy is far from the reference."""
    limit, kl = seen.block.kl_limit, seen.level(KL)
    if limit is None or kl is None or kl <= limit:
        return None
    return (
        f"the policy is {kl:.3g} nats a completion from the reference, over ppo.watch.kl_limit {limit:g}: "
        "raise ppo.kl_coef or set ppo.kl_target, or lower ppo.optimizer.learning_rate"
    )


def kl_growth(seen: Seen) -> str | None:
    """It goes away from it faster and faster."""
    factor, kl, before = seen.block.kl_growth, seen.level(KL), seen.level(KL, back=1)
    if factor is None or kl is None or before is None or seen.windows < 3:  # from 0 every growth is large
        return None
    if kl < KL_FLOOR or kl <= factor * before:
        return None
    return (
        f"the KL to the reference runs away: {kl:.3g} nats a completion after {before:.3g} in the "
        f"{seen.block.window} iterations before: raise ppo.kl_coef, or lower ppo.optimizer.learning_rate"
    )


def entropy_collapse(seen: Seen) -> str | None:
    """The policy has become nearly certain of each token."""
    share, new, first = seen.block.entropy_collapse, seen.window("entropy"), seen.first("entropy")
    if share is None or not (new and first) or median(new) >= share * median(first):
        return None
    return (
        f"the policy's entropy has collapsed to {median(new):.3g} nats a token from {median(first):.3g}, so that it "
        "explores no more: lower ppo.optimizer.learning_rate or ppo.epochs, or raise ppo.kl_coef"
    )


def length_hacking(seen: Seen) -> str | None:
    """The score rises, but at equal length hardly or not at all."""
    if seen.block.length_hacking is None:
        return None
    for back in _windows_before_a_rise(seen):
        rise = median(seen.window(SCORE)) - median(seen.window(SCORE, back))
        new, old = seen.window(CONTROLLED), seen.window(CONTROLLED, back)
        controlled = median(new) - median(old)
        if controlled <= (1 - seen.block.length_hacking) * rise and higher_share(new, old) <= FLAT:
            return (
                f"since {seen.iterations(back)} the score rose by {rise:.3g}, but by {controlled:.3g} at equal "
                "length: the policy learns to write longer or shorter, not better; set ppo.length_penalty, or train "
                "the reward on pairs of like length"
            )
    return None


def gold_fall(seen: Seen) -> str | None:
    """The score rises while a gold source's falls (over-optimisation, Gao et al. 2022, arXiv 2210.10760)."""
    if seen.block.gold_fall is None:
        return None
    for back in _windows_before_a_rise(seen):
        for source in seen.gold:
            new, old = (seen.window(f"score/{source}", each) for each in (0, back))
            if higher_share(old, new) >= seen.block.gold_fall:
                return (
                    f"since {seen.iterations(back)} the score rose while the gold score '{source}' fell from "
                    f"{median(old):.3g} to {median(new):.3g}: the reward is over-optimised; stop here (ppo.early_stop "
                    f"on score/{source}), raise ppo.kl_coef, or add reward sources"
                )
    return None


def repetition_rise(seen: Seen) -> str | None:
    """Completions repeat themselves more than at first."""
    limit, new, first = seen.block.repetition_rise, seen.window("repetition"), seen.first("repetition")
    if limit is None or not rose_by(limit, new, first):
        return None
    return (
        f"completions repeat themselves: {median(new):.0%} of their n-grams stood in them before, "
        f"{median(first):.0%} at first: look at the samples, and raise ppo.kl_coef or add a reward source against it"
    )


def value_failure(seen: Seen) -> str | None:
    """The values, warmed up, foretell the returns no better than a constant."""
    limit, explained = seen.block.value_failure, seen.level("explained_variance")
    warm = len(seen.history) >= seen.block.value_warmup + seen.block.window
    if limit is None or explained is None or not warm or explained >= limit:
        return None
    return (
        f"the values explain nothing of the returns (explained variance {explained:.2f}), so that advantages are "
        "noisier than without them: raise ppo.value_coef or ppo.epochs, or set ppo.advantage leave_one_out"
    )


def sampling_gap(seen: Seen) -> str | None:
    """Sampling and training compute different log-probs of the same tokens."""
    limit, gap = seen.block.sampling_gap, seen.level("sampling_gap")
    if limit is None or gap is None or gap <= limit:
        return None
    return (
        f"log-probs of sampling and of training differ by {gap:.2g} nats a token, over ppo.watch.sampling_gap "
        f"{limit:g}: what is trained is not what sampled; set model.precision fp32"
    )


def stopped_fall(seen: Seen) -> str | None:
    """Fewer completions end by themselves than at first."""
    limit, new, first = seen.block.stopped_fall, seen.window("stopped_share"), seen.first("stopped_share")
    if limit is None or not rose_by(limit, first, new):
        return None
    return (
        f"only {median(new):.0%} of the completions end by themselves, {median(first):.0%} at first: raise "
        "ppo.missing_eos_penalty or ppo.sampling.max_new_tokens"
    )


def _windows_before_a_rise(seen: Seen) -> Iterator[int]:
    """The windows, the nearest first, since which the score clearly rose."""
    for back in range(1, seen.windows):
        if higher_share(seen.window(SCORE), seen.window(SCORE, back)) >= CLEAR:
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
