"""The rows of the critique loop and of judges: critiques, revisions, comparisons and the scores behind a label."""

from dataclasses import dataclass, field

from align.records import Conversation, FinishReason, Row, Split


@dataclass(frozen=True)
class Critique(Row):
    """One round of critique and revision of one completion.

    `evidence` has the ids of the passages that were shown, `cited` those that the critique cites, made-up ones too.
    `finish_reason`, `seed` and `provenance` are the revision's; the critique, which another engine may have written,
    has its own. `critique_finish_reason` is None where no critique was asked for, and in rows of earlier versions.
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
"""Said of a revision that the judge preferred, and that is set aside all the same."""


@dataclass(frozen=True)
class Revision(Row):
    """What the loop made of a sample: the completion after the last round, and whether the judge preferred it.

    `p_better` is the judge's probability that the revision is better than the original; `reason` says why a rejected
    revision was rejected (`JUDGED_WORSE`, or the name of a filter), and is empty for an accepted one.
    `principle_ids` has every round's principle, `revised_by` those of the rounds that led to the completion: a round
    whose revision a filter caught did not. `seed` and `provenance` are the completion's, `judged_by` the principles
    that decided. `original_cut` says that the length limit ended the original; `sample_id` is what the judge's scores
    call the row.
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

    `p_a` is the probability that A is better, both orders averaged; `p_a_by_principle` has each principle's own, and
    `position_bias` is the mean of (probability given to the first place) minus one half, in [-0.5, 0.5]. `p_a` is None
    where the judge abstained or nothing told the two apart; `reason` then says which. `decided_by` has the principles
    that `p_a` follows from. `provenance` is that of both completions.
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
    """What the judge's engine gave for a principle's opinion of a comparison, in one view: labels follow from these.

    `comparison_id` is of a revision, compared with its original, the sample's id; the revision is A.
    `view` is, of a choice, the order in which the completions were shown, 'ab' or 'ba'; of a contrast, the completion
    and what stood before it: 'a', 'a opposite', 'b' or 'b opposite'. `logprobs` are in nats, of the letters A and B or
    the sum over the completion's `tokens`; None is minus infinity (a server that did not show the letter).
    `option_mass` is the probability of the letters together. `request_id` is the digest of all that was asked, and
    `reasoning` what the judge thought before, with its own.
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
