"""Best-of-n: of n completions of a policy the one that a reward model scores highest, what any training must beat."""

from collections.abc import Sequence
from dataclasses import replace

from align.engines.engine import Request
from align.evaluation.report import EvaluatedSample
from align.run.reproducibility import derive_seed


def best_of_name(n: int) -> str:
    """What best-of-n is called among the policies."""
    return f"best-of-{n}"


def candidate_requests(requests: Sequence[Request], n: int, seed: int) -> list[Request]:
    """n requests of each, with ids and seeds of their own that do not depend on n."""
    return [
        replace(request, id=candidate_id(request.id, number), seed=derive_seed(seed, "best of n", request.id, number))
        for request in requests
        for number in range(n)
    ]


def candidate_id(request_id: str, number: int) -> str:
    """The id of a request's candidate."""
    return f"{request_id}/{number}"


def best_of_each(candidates: Sequence[EvaluatedSample], policy: str) -> list[EvaluatedSample]:
    """Each prompt's candidate of the highest score, the first of equal ones, as a completion of `policy`."""
    best: dict[str, EvaluatedSample] = {}
    for candidate in candidates:
        score, highest = candidate.score, best.get(candidate.prompt_id, candidate).score
        assert score is not None and highest is not None
        if candidate.prompt_id not in best or score > highest:
            best[candidate.prompt_id] = candidate
    return [replace(sample, id=f"{policy}/{prompt_id}", policy=policy) for prompt_id, sample in best.items()]
