"""The rows that the critique loop and judges write: critiques, revisions, comparisons and the scores behind a label."""

from dataclasses import dataclass, field

from align.records import Conversation, FinishReason, Row, Split


@dataclass(frozen=True)
class Critique(Row):
    """One round of critique and revision of one completion.

    `evidence` has the ids of the passages that were shown. `cited` has the ids that the critique cites, including
    made-up ones. `finish_reason`, `seed` and `provenance` belong to the revision; those of the critique, which another
    engine may have written, start with `critique_`. `critique_finish_reason` is None where no critique was asked for,
    and in rows of earlier versions.
    """

    id: str
    prompt_id: str
    round: int
    principle_id: str
    completion: str
    critique: str
    revision: str
    finish_reason: FinishReason
    seed: int = 0
    evidence: tuple[str, ...] = ()
    cited: tuple[str, ...] = ()
    provenance: str = ""
    critique_seed: int | None = None
    critique_provenance: str = ""
    critique_finish_reason: FinishReason | None = None


JUDGED_WORSE = "judged worse"
NEAR_DUPLICATE = "near-duplicate"
"""Reason to reject a revision that the judge preferred."""


@dataclass(frozen=True)
class Revision(Row):
    """A sample's completion after the last round of critique and revision, and whether the judge preferred it.

    `p_better` is the judge's probability that the revision is better than the original. `reason` says why a revision
    was rejected (`JUDGED_WORSE`, or the name of a filter), and is empty for an accepted one. `principle_ids` has every
    round's principle; `revised_by` has those of the rounds whose revision was kept, not caught by a filter. `seed` and
    `provenance` belong to the completion. `judged_by` has the principles that decided. `original_cut` says that the
    length limit cut the original. The judge's scores refer to the row by `sample_id`.
    """

    id: str
    prompt_id: str
    prompt: Conversation
    original: str
    completion: str
    principle_ids: tuple[str, ...]
    p_better: float
    accepted: bool
    reason: str
    split: Split
    category: str = ""
    judged_by: tuple[str, ...] = ()
    seed: int | None = None
    provenance: str = ""
    original_seed: int | None = None
    original_provenance: str = ""
    judge_provenance: str = ""
    original_cut: bool = False
    sample_id: str = ""
    revised_by: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison(Row):
    """Two completions of a prompt and the judge's verdict.

    `p_a` is the probability that A is better, averaged over both orders; `p_a_by_principle` has each principle's own.
    `position_bias` is the mean probability given to the completion shown first, minus one half, in [-0.5, 0.5]. `p_a`
    is None where the judge abstained or found a tie; `reason` then says which. `decided_by` has the principles that
    `p_a` follows from. `provenance` belongs to both completions.
    """

    id: str
    prompt_id: str
    prompt: Conversation
    completion_a: str
    completion_b: str
    p_a: float | None
    p_a_by_principle: dict[str, float] = field(default_factory=dict)
    position_bias: float = 0.0
    reason: str = ""
    decided_by: tuple[str, ...] = ()
    judge: str = ""
    category: str = ""
    seed_a: int | None = None
    seed_b: int | None = None
    provenance: str = ""
    judge_provenance: str = ""


@dataclass(frozen=True)
class OpinionScores(Row):
    """The engine's scores for one principle's opinion on one comparison, in one view. Labels are computed from these.

    For a revision, `comparison_id` is the sample's id, A the revision and B its original. For a `choice`, `view` is the
    order in which the completions were shown, 'ab' or 'ba', and `logprobs` are those of the letters A and B. For a
    `contrast`, `view` is the completion and the text it was conditioned on ('a', 'a opposite', 'b' or 'b opposite'),
    and `logprobs` has the sum over the completion's `tokens`. Both are in nats; None is minus infinity (a server did
    not return the letter). `option_mass` is the total probability of the letters. `request_id` is a digest of the
    request. `reasoning` is the chain of thought before the letter; `reasoning_id` is the digest of its request.
    """

    id: str
    comparison_id: str
    principle_id: str
    view: str
    request_id: str
    logprobs: tuple[float | None, ...]
    tokens: tuple[int, ...]
    option_mass: float | None = None
    reasoning: str = ""
    reasoning_id: str = ""
    reasoning_end: str = ""


Scores = tuple[OpinionScores, ...]
