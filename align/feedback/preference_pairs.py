"""What a judge is asked about a comparison, what its verdict makes of it, and the pairs that are trained on."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from align.feedback.opinions import Question
from align.feedback.records import Comparison, Revision
from align.records import Message, PreferencePair, pair_id

if TYPE_CHECKING:
    from align.feedback.judge import Verdict


def with_provenance(row: Comparison, completions: str, label: str) -> Comparison:
    """The comparison with the entries that it names; that of the label only where the judge was asked."""
    return replace(row, provenance=completions, judge_provenance=label if row.judge else "")


def question_of(row: Comparison) -> Question:
    """What a judge is asked about a comparison."""
    return Question(row.id, row.prompt, row.completion_a, row.completion_b, row.category)


def with_verdict(row: Comparison, verdict: "Verdict", judge: str) -> Comparison:
    """The comparison with what its judge said."""
    return replace(
        row,
        p_a=verdict.p_a,
        p_a_by_principle=verdict.by_principle,
        position_bias=verdict.position_bias,
        reason=verdict.reason,
        decided_by=verdict.decided_by,
        judge=judge,
    )


def pair_of(row: Comparison) -> PreferencePair | None:
    """The comparison as a training pair; None where it was not decided."""
    if row.p_a is None:
        return None
    a, b = Message("assistant", row.completion_a), Message("assistant", row.completion_b)
    chosen, rejected = (a, b) if row.p_a >= 0.5 else (b, a)
    seeds = (row.seed_a, row.seed_b) if row.p_a >= 0.5 else (row.seed_b, row.seed_a)
    return PreferencePair(
        id=pair_id(row.prompt, chosen, rejected),
        prompt=row.prompt,
        chosen=(chosen,),
        rejected=(rejected,),
        probability=max(row.p_a, 1 - row.p_a),
        source="ai",
        category=row.category,
        judged_by=row.decided_by,
        chosen_seed=seeds[0],
        rejected_seed=seeds[1],
        chosen_provenance=row.provenance,
        rejected_provenance=row.provenance,
        judge_provenance=row.judge_provenance,
    )


def revision_pairs(rows: Iterable[Revision], counts: Counter[str]) -> Iterator[PreferencePair]:
    """Accepted revisions over their originals; those that are not accepted are counted by their reason.

    An original that is cut or empty is none to train on, as in a comparison: it is left out and counted.
    """
    for row in rows:
        if not row.accepted:
            counts[f"revision_pairs_rejected: {row.reason}"] += 1
        elif fault := "cut" if row.original_cut else "" if row.original.strip() else "empty":
            counts[f"revision_pairs_{fault}"] += 1
        else:
            yield pair_of_revision(row)


def pair_of_revision(row: Revision) -> PreferencePair:
    """The revision over its original."""
    chosen, rejected = Message("assistant", row.completion), Message("assistant", row.original)
    return PreferencePair(
        id=pair_id(row.prompt, chosen, rejected),
        prompt=row.prompt,
        chosen=(chosen,),
        rejected=(rejected,),
        probability=row.p_better,
        source="revision",
        category=row.category,
        judged_by=row.judged_by,
        revised_by=row.revised_by,
        chosen_seed=row.seed,
        rejected_seed=row.original_seed,
        chosen_provenance=row.provenance,
        rejected_provenance=row.original_provenance,
        judge_provenance=row.judge_provenance,
    )
