"""The rows that chains of critique and revision become, with the judge's verdicts on them."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from align.constitution.constitution import Constitution
from align.feedback.critique import CritiqueLoop, RevisionChain
from align.feedback.judge import Judge, broken_hard_rule
from align.feedback.judged_revisions import question_of, with_verdict
from align.feedback.records import Critique, OpinionScores, Revision
from align.records import Sample, digest
from align.run.streaming import Window


def revise_window(
    window: Window[Sample], loop: CritiqueLoop, judge: Judge, rounds: int, judge_provenance: str
) -> Iterator[tuple[RevisionChain, Revision, tuple[OpinionScores, ...]]]:
    """Each sample's chain, its row, and the scores behind its verdict. Chains with a fault are not judged."""
    loop = replace(loop, journal_path=window.folder / "steps.journal", label=window.label)
    chains = loop.run(window.rows, rounds)
    rows = [_row(chain, chain.fault or hard_rule_broken(judge.constitution, chain)) for chain in chains]
    sound = [row for row in rows if not row.reason]
    answers = judge.compare(
        map(question_of, sound), window.folder / "verdicts.journal", f"judge revisions{window.label}"
    )
    verdicts = {row.id: verdict for row, verdict in zip(sound, answers, strict=True)}
    for chain, row in zip(chains, rows, strict=True):
        if verdict := verdicts.get(row.id):
            yield chain, replace(with_verdict(row, verdict), judge_provenance=judge_provenance), verdict.scores
        else:
            yield chain, row, ()


def hard_rule_broken(constitution: Constitution, chain: RevisionChain) -> str:
    """Which hard principle's rule the completion breaks, as a reason; empty if it breaks none."""
    broken = broken_hard_rule(constitution, chain.sample.category, chain.completion)
    return f"breaks {broken.id}" if broken else ""


def _row(chain: RevisionChain, fault: str) -> Revision:
    """A chain's row, rejected if the chain has a fault. Without one it is yet to be judged."""
    leading = _leading_rounds(chain)
    last = leading[-1] if leading else None
    return Revision(
        id=digest([chain.sample.id, "revision"]),
        prompt_id=chain.sample.prompt_id,
        prompt=chain.sample.prompt,
        original=chain.sample.completion,
        original_cut=chain.sample.finish_reason == "length",
        completion=last.revision.strip() if chain.fault and last else chain.completion,
        principle_ids=chain.principle_ids,
        p_better=0.5,
        accepted=False,
        reason=fault,
        split=chain.sample.split,
        category=chain.sample.category,
        seed=last.seed if last else chain.sample.seed,
        provenance=last.provenance if last else chain.sample.provenance,
        original_seed=chain.sample.seed,
        original_provenance=chain.sample.provenance,
        sample_id=chain.sample.id,
        revised_by=tuple(made.principle_id for made in leading),
    )


def _leading_rounds(chain: RevisionChain) -> Sequence[Critique]:
    """The rounds that led to the completion in the row; the last of them wrote it.

    These are the rounds whose revision replaced the completion, or, for a chain with a fault, the last round alone. If
    no principle applied there are none.
    """
    if chain.fault:
        return chain.rounds[-1:]
    return [made for made, fault in zip(chain.rounds, chain.faults, strict=True) if not fault]
