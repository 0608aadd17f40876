"""Which faults of a server pass by themselves, how long to wait for that, and what to tell of those that do not."""

import asyncio
import email.utils
import itertools
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import openai

from align.errors import AlignError, InputError
from align.settings.blocks import EngineBlock

FIRST_PAUSE = 0.5
LONGEST_PAUSE = 30.0
"""Seconds between tries: they double from the first to the longest, each cut by up to a half at random, so that many
requests that failed together do not come back together."""

LONGEST_ASKED_FOR = 300.0
"""A server that asks for a longer pause than this means a quota, which no retry outlasts."""

_PASSING_STATUS = {408, 409, 425, 429}
_LASTING_WORDS = ("insufficient_quota", "not supported", "not implemented")

Answer = TypeVar("Answer")


class MalformedReply(Exception):
    """A reply that is not what the protocol promises: cut short, garbled, empty, or of another shape."""


async def try_until_answered(ask: Callable[[], Awaitable[Answer]], *, retries: int, seconds: float) -> Answer:
    """What `ask` returns, at the first try or at one of the retries. Each try may take so many seconds in all.

    Raises:
        TimeoutError | openai.OpenAIError | MalformedReply: the fault of the last try, or one that does not pass.
    """
    for tried in itertools.count():
        try:
            async with asyncio.timeout(seconds):
                return await ask()
        except (TimeoutError, openai.OpenAIError, MalformedReply) as error:
            if tried >= retries or not passes(error):
                raise
            wait = pause(tried, error)
        await asyncio.sleep(wait)
    raise AssertionError("unreachable")


def passes(error: Exception) -> bool:
    """Whether the same request may succeed later: a rate limit, a server's fault, a broken connection or reply."""
    if not isinstance(error, openai.APIStatusError):
        return isinstance(error, TimeoutError | openai.APIConnectionError | MalformedReply)
    if error.status_code not in _PASSING_STATUS and (error.status_code < 500 or error.status_code == 501):
        return False
    lasting = any(words in str(error).lower() for words in _LASTING_WORDS)
    return not lasting and (asked_pause(error) or 0.0) <= LONGEST_ASKED_FOR


def pause(tried: int, error: Exception) -> float:
    """Seconds to wait after this many retries: what the server asked for, if anything; or a back-off with jitter."""
    asked_for = asked_pause(error)
    backoff = min(FIRST_PAUSE * 2.0 ** min(tried, 30), LONGEST_PAUSE) * random.uniform(0.5, 1.0)
    return asked_for or backoff


def asked_pause(error: Exception) -> float | None:
    """Seconds of the reply's `Retry-After` (a number or a date, RFC 9110) or `retry-after-ms`; None without one."""
    if not isinstance(error, openai.APIStatusError):
        return None
    headers = error.response.headers
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            return max(0.0, float(headers.get(name, "")) * unit)
        except ValueError:
            continue
    date = email.utils.parsedate_tz(headers.get("retry-after", ""))
    return None if date is None else max(0.0, email.utils.mktime_tz(date) - time.time())


def explained(error: Exception, engine: EngineBlock, key: str) -> AlignError:
    """The fault, where it is and the remedy; never what might hold the key."""
    server = engine.base_url or "https://api.openai.com"
    if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
        return InputError(f"engine {server}: refused the key; check the variable {engine.api_key_env}")
    if isinstance(error, openai.NotFoundError):
        return InputError(
            f"engine {server}: has no model {engine.model!r}, or is not such a server; "
            "check engine.model and engine.base_url (which mostly ends in /v1)"
        )
    kept = "what was finished is kept: run the same command again"
    tried = f"after {engine.max_retries} retries; {kept}"
    if isinstance(error, TimeoutError | openai.APITimeoutError):
        return AlignError(
            f"engine {server}: no answer in {engine.timeout_seconds:g} seconds, {tried}, with a longer "
            "engine.timeout_seconds or a lower engine.concurrency where the server is only slow"
        )
    if isinstance(error, openai.APIConnectionError):
        return InputError(f"engine {server}: cannot be reached, {tried} once it runs, or change engine.base_url")
    said = (str(error).replace(key, "***") if key else str(error))[:300]
    if isinstance(error, MalformedReply):
        return AlignError(f"engine {server}: {said} ({tried}; `align engine check` shows what the server can do)")
    if isinstance(error, openai.RateLimitError | openai.InternalServerError):
        waits = asked_pause(error)
        asks = f"asks to wait {waits:.0f} seconds" if waits and waits > LONGEST_ASKED_FOR else ""
        return AlignError(f"engine {server}: {said} ({f'{asks}; {kept} after that' if asks else tried})")
    return InputError(f"engine {server}: refused the request: {said}")
