"""What `revise` and `compare` count and measure about their rows, added up one row at a time."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from align.feedback.agreement import AgreementTally, Label, margins_of
from align.feedback.critique import RevisionChain
from align.feedback.evidence import evidence_figures
from align.feedback.records import Comparison, OpinionScores, Revision
from align.settings.blocks import JudgeBlock


@dataclass
class _Mean:
    """A running mean; 0 over nothing."""

    total: float = 0
    count: int = 0

    def add(self, total: float, count: int = 1) -> None:
        self.total += total
        self.count += count

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else 0.0


class RevisionTally:
    """Counts and figures of revisions and of the chains that led to them."""

    def __init__(self, rounds: int) -> None:
        self.samples = 0
        self.accepted = 0
        self.critiques = 0
        self.critiques_cut = 0
        self.reasons: Counter[str] = Counter()
        self._preambles = 0
        self._original_characters = _Mean()
        self._by_principle: dict[str, Counter[str]] = defaultdict(lambda: Counter(draws=0, filtered=0, accepted=0))
        self._evidence: Counter[str] = Counter()
        self._rounds = [_RoundTally() for _ in range(rounds)]

    def add(self, chain: RevisionChain, row: Revision) -> None:
        """Add a chain and the row that it became."""
        self.samples += 1
        self.accepted += row.accepted
        self._preambles += chain.preambles
        self._original_characters.add(len(chain.sample.completion))
        if not row.accepted:
            self.reasons[row.reason] += 1
        for made, fault, tally in zip(chain.rounds, chain.faults, self._rounds, strict=False):
            self._by_principle[made.principle_id].update(draws=1, filtered=bool(fault), accepted=row.accepted)
            self.critiques += made.critique_finish_reason is not None
            self.critiques_cut += made.critique_finish_reason == "length"
            self._evidence.update(evidence_figures([made]).get("evidence", {}))
            tally.characters.add(len(made.revision))
            tally.filtered.add(bool(fault))
        last = max((number for number, fault in enumerate(chain.faults) if not fault), default=None)
        if last is not None:
            self._rounds[last].last_accepted.add(row.accepted)

    def counts(self) -> dict[str, int]:
        """How many revisions were accepted, how many were rejected for each reason and how many preambles were removed;
        if critiques were asked for, also how many of them the length limit cut."""
        return {
            "samples": self.samples,
            "accepted": self.accepted,
            "rejected": self.samples - self.accepted,
            **{f"rejected: {reason}": count for reason, count in sorted(self.reasons.items())},
            "preambles_removed": self._preambles,
            **({"critiques_cut": self.critiques_cut} if self.critiques else {}),
        }

    def figures(self) -> dict[str, Any]:
        """By principle: draws, filtered revisions and accepted chains. By round: see `_RoundTally`. Use of evidence."""
        return {
            "by_principle": {name: dict(counts) for name, counts in sorted(self._by_principle.items())},
            "by_round": [each.figures() for each in self._rounds],
            **({"evidence": dict(self._evidence)} if self._evidence else {}),
            "original_characters": self._original_characters.value,
        }


@dataclass
class _RoundTally:
    """The revisions of one round: their mean length in characters, and the share that a filter caught. Of the chains
    whose completion is this round's revision: how many there are, and the share that was accepted."""

    characters: _Mean = field(default_factory=_Mean)
    filtered: _Mean = field(default_factory=_Mean)
    last_accepted: _Mean = field(default_factory=_Mean)

    def figures(self) -> dict[str, float]:
        return {
            "characters": self.characters.value,
            "filtered": self.filtered.value,
            "last": self.last_accepted.count,
            "last_accepted": self.last_accepted.value,
        }


class ComparisonTally:
    """Counts and figures of comparisons and the scores behind them, and how the principles agree on them."""

    def __init__(self, principles: Sequence[str], judge: JudgeBlock) -> None:
        self.agreement = AgreementTally(principles, *margins_of(judge))
        self.comparisons = 0
        self.decided = 0
        self.reasons: Counter[str] = Counter()
        self._opinions = 0
        self._abstained = 0
        self._reasoning_cut = 0
        self._position_bias = _Mean()
        self._option_mass = _Mean()
        self._a_chosen = _Mean()
        self._longer_chosen = _Mean()
        self._probability = _Mean()
        self._deciles: Counter[int] = Counter()

    def add(self, row: Comparison, scores: Sequence[OpinionScores] = ()) -> None:
        """Add a comparison and the engine's scores for it."""
        self.comparisons += 1
        self._add_scores(row, scores)
        self.agreement.add(Label(row.p_a, row.p_a_by_principle))
        # Ties count too: averaging both orders turns the opinions of a judge that follows only position into ties.
        if row.p_a_by_principle:
            self._position_bias.add(row.position_bias)
        if row.p_a is None:
            self.reasons[row.reason] += 1
            return
        probability = max(row.p_a, 1 - row.p_a)
        self.decided += 1
        self._a_chosen.add(row.p_a > 0.5)
        self._longer_chosen.add(_longer_chosen(row, row.p_a > 0.5))
        self._probability.add(probability)
        self._deciles[min(int(10 * probability), 9)] += 1

    def _add_scores(self, row: Comparison, scores: Sequence[OpinionScores]) -> None:
        asked = {each.principle_id for each in scores}
        masses = [each.option_mass for each in scores if each.option_mass is not None]
        self._opinions += len(asked)
        self._abstained += len(asked - row.p_a_by_principle.keys())
        self._option_mass.add(sum(masses), len(masses))
        self._reasoning_cut += sum(each.reasoning_end == "length" for each in scores)

    def counts(self) -> dict[str, int]:
        """How many comparisons were decided, and how many were not for each reason. How many opinions an engine was
        asked for (one per comparison and principle), how many of them it abstained from, and how many chains of thought
        the length limit cut."""
        undecided = {f"undecided: {reason}": count for reason, count in sorted(self.reasons.items())}
        opinions = {"opinions": self._opinions, "opinions_abstained": self._abstained} if self._opinions else {}
        cut = {"reasoning_cut": self._reasoning_cut} if self._reasoning_cut else {}
        return {"comparisons": self.comparisons, "decided": self.decided, **undecided, **opinions, **cut}

    def figures(self) -> dict[str, Any]:
        """Over everything the judge saw: its mean position bias and, for a `choice` judge, the mean probability of the
        two letters together. Over the decided comparisons: how often A and the longer completion were chosen, and how
        sure the labels are. And the share left undecided."""
        means = {"position_bias": self._position_bias, "option_mass": self._option_mass}
        seen = {name: mean.value for name, mean in means.items() if mean.count}
        if not self.decided:
            return seen
        return {
            **seen,
            "a_chosen": self._a_chosen.value,
            "longer_chosen": self._longer_chosen.value,
            "mean_probability": self._probability.value,
            "probability": {f"{10 * n}-{10 * n + 10}%": self._deciles[n] / self.decided for n in range(5, 10)},
            "undecided": 1 - self.decided / self.comparisons,
        }


def _longer_chosen(row: Comparison, a_chosen: bool) -> float:
    """1 if the longer completion was preferred, one half if both are equally long, otherwise 0."""
    difference = len(row.completion_a) - len(row.completion_b)
    return 0.5 if difference == 0 else float((difference > 0) == a_chosen)
