"""The question that a judge is asked about a comparison, the comparison with its verdict, and the pairs to train on."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from align.feedback.judge import Verdict
from align.feedback.opinions import Question
from align.feedback.records import Comparison, Revision
from align.records import Message, PreferencePair, pair_id


def with_provenance(row: Comparison, completions: str, label: str) -> Comparison:
    """The comparison with the ids of its provenance entries; the label's only if the judge was asked."""
    return replace(row, provenance=completions, judge_provenance=label if row.judge else "")


def question_of(row: Comparison) -> Question:
    """The question which completion of a comparison is better."""
    return Question(row.id, row.prompt, row.completion_a, row.completion_b, row.category)


def with_verdict(row: Comparison, verdict: Verdict, judge: str) -> Comparison:
    """The comparison with its verdict and the name of the judge."""
    return replace(
        row,
        p_a=verdict.p_a,
        p_a_by_principle=verdict.by_principle,
        position_bias=verdict.position_bias,
        reason=verdict.reason,
        decided_by=verdict.decided_by,
        judge=judge,
    )


def comparison_pair(row: Comparison) -> PreferencePair | None:
    """The comparison as a training pair; None if it was not decided."""
    if row.p_a is None:
        return None
    a = row.completion_a, row.seed_a, row.provenance
    b = row.completion_b, row.seed_b, row.provenance
    sides = (a, b) if row.p_a >= 0.5 else (b, a)
    return _pair(row, *sides, probability=max(row.p_a, 1 - row.p_a), source="ai", judged_by=row.decided_by)


def revision_pairs(rows: Iterable[Revision], counts: Counter[str]) -> Iterator[PreferencePair]:
    """Accepted revisions preferred to their originals; rejected ones are counted by their reason.

    As in a comparison, an original that was cut or is empty makes no pair; it is counted.
    """
    for row in rows:
        if not row.accepted:
            counts[f"revision_pairs_rejected: {row.reason}"] += 1
        elif fault := "cut" if row.original_cut else "" if row.original.strip() else "empty":
            counts[f"revision_pairs_{fault}"] += 1
        else:
            yield revision_pair(row)


def revision_pair(row: Revision) -> PreferencePair:
    """The revision, preferred to its original."""
    chosen = row.completion, row.seed, row.provenance
    rejected = row.original, row.original_seed, row.original_provenance
    principles = {"judged_by": row.judged_by, "revised_by": row.revised_by}
    return _pair(row, chosen, rejected, probability=row.p_better, source="revision", **principles)


Side = tuple[str, int | None, str]
"""A completion, its seed and the id of its provenance entry."""


def _pair(row: Comparison | Revision, chosen: Side, rejected: Side, **fields: Any) -> PreferencePair:
    chosen_turn, rejected_turn = Message("assistant", chosen[0]), Message("assistant", rejected[0])
    return PreferencePair(
        id=pair_id(row.prompt, chosen_turn, rejected_turn),
        prompt=row.prompt,
        chosen=(chosen_turn,),
        rejected=(rejected_turn,),
        category=row.category,
        chosen_seed=chosen[1],
        rejected_seed=rejected[1],
        chosen_provenance=chosen[2],
        rejected_provenance=rejected[2],
        judge_provenance=row.judge_provenance,
        **fields,
    )
