"""Best-of-n: the one of a policy's n completions that a reward model scores highest. Training has to beat it."""

import math
from collections.abc import Sequence
from dataclasses import replace

from align.engines.engine import Request
from align.evaluation.report import EvaluatedSample
from align.run.reproducibility import derive_seed


def best_of_name(n: int) -> str:
    """The name of best-of-n among the policies."""
    return f"best-of-{n}"


def candidate_requests(requests: Sequence[Request], n: int, seed: int) -> list[Request]:
    """n requests for each request. Their ids and seeds do not depend on n."""
    return [
        replace(request, id=candidate_id(request.id, number), seed=derive_seed(seed, "best of n", request.id, number))
        for request in requests
        for number in range(n)
    ]


def candidate_id(request_id: str, number: int) -> str:
    """The id of one of a request's n candidates."""
    return f"{request_id}/{number}"


def best_of_each(candidates: Sequence[EvaluatedSample], policy: str) -> list[EvaluatedSample]:
    """Each prompt's candidate with the highest score (the first among equals), as a completion of `policy`.

    A candidate without an answer has no score, and is taken only if the others have none either.
    """
    best: dict[str, EvaluatedSample] = {}
    for candidate in candidates:
        held = best.get(candidate.prompt_id)
        if held is None or _order(candidate) > _order(held):
            best[candidate.prompt_id] = candidate
    return [replace(sample, id=f"{policy}/{prompt_id}", policy=policy) for prompt_id, sample in best.items()]


def _order(candidate: EvaluatedSample) -> float:
    return -math.inf if candidate.score is None else candidate.score
