"""Prompts that a server refuses for what they say or for their length: they are left out, and the run goes on."""

import math
import re
from collections.abc import Iterable, Iterator
from typing import TypeVar

import openai

from align.engines.engine import ChoiceRequest, ChoiceScores, Completed, Request
from align.engines.server_faults import said_by
from align.errors import InputError
from align.settings.blocks import EngineBlock

_REFUSED_CODES = {
    "content_filter",
    "content_policy_violation",
    "context_length_exceeded",
    "exceed_context_size_error",
    "invalid_prompt",
    "string_above_max_length",
}
_REFUSED_MESSAGE = re.compile(
    r"context[ _-](length|window|size)|content[ _-](filter|policy|management)|safety (filter|policy|system)"
    r"|(prompt|input|inputs|message|conversation)`? (tokens )?(is|are|was|were|exceeds?|must have) .*"
    r"(too long|longer than|flagged|exceed|maximum|less than)|`inputs` tokens \+ `max_new_tokens` must be"
    r"|flagged|prompt is too long|too many tokens",
    re.IGNORECASE,
)
"""How OpenAI, Azure, vLLM, SGLang, TGI, llama.cpp and OpenRouter refuse one prompt for what it says or its length."""

MIN_ALL_REFUSED = 8
"""If a server refuses at least this many requests and answers none, the fault is taken to be in the settings."""

AnswerT = TypeVar("AnswerT", Completed, ChoiceScores)


def prompt_refusal(error: Exception, key: str) -> str:
    """Why a server refused one prompt (its content, or its length); empty for any other error.

    The next prompt may be answered, so such a refusal need not end a run.
    """
    if not isinstance(error, openai.APIStatusError) or error.status_code not in (400, 403, 413, 422):
        return ""
    body = error.body if isinstance(error.body, dict) else {}
    codes = {str(code) for code in (error.code, error.type, body.get("code"), body.get("type"))}
    is_refusal = error.status_code == 413 or codes & _REFUSED_CODES or _REFUSED_MESSAGE.search(str(error))
    return said_by(error, key) if is_refusal else ""


def refused_completion(request: Request, said: str) -> Completed:
    return Completed(request.id, "", "length", 0, answered=False, refused=said)


def refused_scores(request: ChoiceRequest, said: str) -> ChoiceScores:
    count = len(request.choices)
    return ChoiceScores(request.id, (-math.inf,) * count, (1,) * count, said)


def held_until_answered(results: Iterable[AnswerT], engine: EngineBlock) -> Iterator[AnswerT]:
    """The results, refused ones not before the first answer.

    So no refusal is kept if a server refuses everything, and all is asked again once its settings are corrected.

    Raises:
        InputError: the server refused all of many requests.
    """
    answered, held = False, list[AnswerT]()
    for result in results:
        answered = answered or not result.refused
        held.append(result)
        if answered:
            yield from held
            held.clear()
    if len(held) >= MIN_ALL_REFUSED:
        raise _all_refused(engine, len(held), held[0].refused)
    yield from held


def _all_refused(engine: EngineBlock, count: int, said: str) -> InputError:
    """The error for a server that refuses whatever it is asked."""
    return InputError(
        f"engine {engine.base_url or 'https://api.openai.com'}: refused all {count} requests, the first with: {said}; "
        "shorten the prompts, lower max_new_tokens, or serve the model with a longer context or without the filter"
    )
