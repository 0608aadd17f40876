"""What revise and compare count and measure of their rows, added up one row at a time."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from align.feedback.agreement import AgreementTally, Label, margins_of
from align.feedback.evidence import grounding
from align.feedback.records import Comparison, OpinionScores, Revision
from align.settings.blocks import JudgeBlock

if TYPE_CHECKING:
    from align.feedback.critique import Chain


class RevisionTally:
    """Counts and figures of revisions, with the chains that led to them."""

    def __init__(self, rounds: int) -> None:
        self.samples = 0
        self.accepted = 0
        self.preambles = 0
        self.critiques = 0
        self.critiques_cut = 0
        self.original_characters = 0
        self.reasons: Counter[str] = Counter()
        self._draws: Counter[str] = Counter()
        self._filtered: Counter[str] = Counter()
        self._accepted: Counter[str] = Counter()
        self._evidence: Counter[str] = Counter()
        self._rounds = [_Round() for _ in range(rounds)]

    def add(self, chain: "Chain", row: Revision) -> None:
        """A chain and the row that it became."""
        self.samples += 1
        self.accepted += row.accepted
        self.preambles += chain.preambles
        self.original_characters += len(chain.sample.completion)
        if not row.accepted:
            self.reasons[row.reason] += 1
        for made, fault, of_round in zip(chain.rounds, chain.faults, self._rounds, strict=False):
            self._draws[made.principle_id] += 1
            self._filtered[made.principle_id] += bool(fault)
            self._accepted[made.principle_id] += row.accepted
            self.critiques += made.critique_finish_reason is not None
            self.critiques_cut += made.critique_finish_reason == "length"
            self._evidence.update(grounding([made]).get("evidence", {}))
            of_round.add(len(made.revision), bool(fault))
        last = max((number for number, fault in enumerate(chain.faults) if not fault), default=None)
        if last is not None:
            self._rounds[last].end(row.accepted)

    def counts(self) -> dict[str, int]:
        """How many were accepted, and how many rejected for each reason; how many preambles were removed; and, where
        critiques were asked for, how many of them the length limit cut."""
        cut = {"critiques_cut": self.critiques_cut} if self.critiques else {}
        return {
            "samples": self.samples,
            "accepted": self.accepted,
            "rejected": self.samples - self.accepted,
            **{f"rejected: {reason}": count for reason, count in sorted(self.reasons.items())},
            "preambles_removed": self.preambles,
            **cut,
        }

    def figures(self) -> dict[str, Any]:
        """By principle: draws, filtered revisions, accepted chains. By round: see `_Round`. And use of evidence."""
        return {
            "by_principle": {
                name: {"draws": draws, "filtered": self._filtered[name], "accepted": self._accepted[name]}
                for name, draws in sorted(self._draws.items())
            },
            "by_round": [each.figures() for each in self._rounds],
            **({"evidence": dict(self._evidence)} if self._evidence else {}),
            "original_characters": _share(self.original_characters, self.samples),
        }


class _Round:
    """Mean length in characters, share that a filter caught, and of the chains that end with this round's revision how
    many there are and what share was accepted."""

    def __init__(self) -> None:
        self._reached = self._characters = self._filtered = self._last = self._last_accepted = 0

    def add(self, characters: int, filtered: bool) -> None:
        self._reached += 1
        self._characters += characters
        self._filtered += filtered

    def end(self, accepted: bool) -> None:
        """A chain ends with this round's revision."""
        self._last += 1
        self._last_accepted += accepted

    def figures(self) -> dict[str, float]:
        return {
            "characters": _share(self._characters, self._reached),
            "filtered": _share(self._filtered, self._reached),
            "last": self._last,
            "last_accepted": _share(self._last_accepted, self._last),
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
        self._option_masses = 0
        self._option_mass = 0.0
        self._a_wins = 0
        self._longer_wins = 0.0
        self._judged = 0
        self._position_bias = 0.0
        self._reasoning_cut = 0
        self._sure = 0.0
        self._tenths: Counter[int] = Counter()

    def add(self, row: Comparison, scores: Sequence[OpinionScores] = ()) -> None:
        """A comparison, and what the judge's engine gave for it."""
        self.comparisons += 1
        self._add_scores(row, scores)
        self.agreement.add(Label(row.p_a, row.p_a_by_principle))
        # Of ties too: a judge that follows the place alone decides nothing once both orders are averaged.
        self._judged += bool(row.p_a_by_principle)
        self._position_bias += row.position_bias if row.p_a_by_principle else 0.0
        if row.p_a is None:
            self.reasons[row.reason] += 1
            return
        sure = max(row.p_a, 1 - row.p_a)
        self.decided += 1
        self._a_wins += row.p_a > 0.5
        self._longer_wins += _longer_won(row, row.p_a > 0.5)
        self._sure += sure
        self._tenths[min(int(10 * sure), 9)] += 1

    def _add_scores(self, row: Comparison, scores: Sequence[OpinionScores]) -> None:
        asked = {each.principle_id for each in scores}
        masses = [each.option_mass for each in scores if each.option_mass is not None]
        self._opinions += len(asked)
        self._abstained += len(asked - row.p_a_by_principle.keys())
        self._option_masses += len(masses)
        self._option_mass += sum(masses)
        self._reasoning_cut += sum(each.reasoning_end == "length" for each in scores)

    def counts(self) -> dict[str, int]:
        """How many comparisons were decided, and how many were not for each reason; and how many opinions an engine was
        asked for, one for each comparison and principle, how many it abstained from, and how many chains of thought the
        length limit cut."""
        undecided = {f"undecided: {reason}": count for reason, count in sorted(self.reasons.items())}
        opinions = {"opinions": self._opinions, "opinions_abstained": self._abstained} if self._opinions else {}
        cut = {"reasoning_cut": self._reasoning_cut} if self._reasoning_cut else {}
        return {"comparisons": self.comparisons, "decided": self.decided, **undecided, **opinions, **cut}

    def figures(self) -> dict[str, Any]:
        """Shares among the decided comparisons: what a judge that only looks at place or length would show, and how
        sure the labels are; the share of all that was left undecided; and of all that the judge saw the mean bias to
        the place shown first and, of a judge that chooses, the mean probability of the two letters together."""
        seen = {"position_bias": self._position_bias / self._judged} if self._judged else {}
        if self._option_masses:
            seen["option_mass"] = self._option_mass / self._option_masses
        if not self.decided:
            return seen
        return {
            **seen,
            "a_chosen": self._a_wins / self.decided,
            "longer_chosen": self._longer_wins / self.decided,
            "mean_probability": self._sure / self.decided,
            "probability": {
                f"{10 * tenth}-{10 * tenth + 10}%": self._tenths[tenth] / self.decided for tenth in range(5, 10)
            },
            "undecided": 1 - self.decided / self.comparisons,
        }


def _longer_won(row: Comparison, a_won: bool) -> float:
    """1 where the longer completion was preferred, one half where both are as long."""
    difference = len(row.completion_a) - len(row.completion_b)
    return 0.5 if difference == 0 else float((difference > 0) == a_won)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
