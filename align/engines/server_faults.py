"""Which server errors are transient, when they are retried, and how the others are reported to the user."""

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

INITIAL_DELAY = 0.5
MAX_DELAY = 30.0
"""Seconds between tries: exponential back-off between these bounds. Each delay is shortened by up to a half at random,
so that requests that failed together are not retried together."""

MAX_REQUESTED_DELAY = 300.0
"""Seconds. A server that asks for a longer delay enforces a quota, and retrying does not help."""

_TRANSIENT_STATUS = {408, 409, 425, 429}
_PERMANENT_MESSAGES = ("insufficient_quota", "not supported", "not implemented")

MAX_SAID = 300
"""Characters that are shown of what a server said."""

Answer = TypeVar("Answer")


class MalformedReply(Exception):
    """A reply that violates the protocol: truncated, garbled, empty, or without a required field."""


async def with_retries(send: Callable[[], Awaitable[Answer]], *, retries: int, timeout: float) -> Answer:
    """What `send` returns, retried after transient errors. Each try may take `timeout` seconds in total.

    Raises:
        TimeoutError | openai.OpenAIError | MalformedReply: a permanent error, or the error of the last try.
    """
    for retry in itertools.count():
        try:
            async with asyncio.timeout(timeout):
                return await send()
        except (TimeoutError, openai.OpenAIError, MalformedReply) as error:
            if retry >= retries or not is_transient(error):
                raise
            delay = retry_delay(retry, error)
        await asyncio.sleep(delay)
    raise AssertionError("unreachable")


def is_transient(error: Exception) -> bool:
    """Whether the same request may succeed later: after a rate limit, a server error, a broken connection or reply."""
    if not isinstance(error, openai.APIStatusError):
        return isinstance(error, TimeoutError | openai.APIConnectionError | MalformedReply)
    if error.status_code not in _TRANSIENT_STATUS and (error.status_code < 500 or error.status_code == 501):
        return False
    is_permanent = any(words in str(error).lower() for words in _PERMANENT_MESSAGES)
    return not is_permanent and (requested_delay(error) or 0.0) <= MAX_REQUESTED_DELAY


def retry_delay(retry: int, error: Exception) -> float:
    """Seconds before the retry with this number (from 0): what the server asked for, or else a back-off with jitter."""
    requested = requested_delay(error)
    backoff = min(INITIAL_DELAY * 2.0 ** min(retry, 30), MAX_DELAY) * random.uniform(0.5, 1.0)
    return requested or backoff


def requested_delay(error: Exception) -> float | None:
    """Seconds of the reply's `retry-after-ms` or `Retry-After` (a number or a date, RFC 9110); None without either."""
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


def said_by(error: Exception, key: str) -> str:
    """The beginning of a server's error message, without the key."""
    return (str(error).replace(key, "***") if key else str(error))[:MAX_SAID]


def as_align_error(error: Exception, engine: EngineBlock, key: str) -> AlignError:
    """The error with the server's address and a remedy, and without the key."""
    server = engine.base_url or "https://api.openai.com"
    if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
        return InputError(f"engine {server}: refused the key; check the environment variable {engine.api_key_env}")
    if isinstance(error, openai.NotFoundError):
        return InputError(
            f"engine {server}: has no model {engine.model!r}, or does not speak OpenAI's protocol; "
            "check engine.model and engine.base_url (which usually ends in /v1)"
        )
    resume = "finished answers are kept; to resume, run the same command again"
    gave_up = f"after {engine.max_retries} retries; {resume}"
    if isinstance(error, TimeoutError | openai.APITimeoutError):
        return AlignError(
            f"engine {server}: no answer in {engine.timeout_seconds:g} seconds, {gave_up}; if the server is only slow, "
            "raise engine.timeout_seconds or lower engine.concurrency"
        )
    if isinstance(error, openai.APIConnectionError):
        return InputError(f"engine {server}: cannot be reached, {gave_up} once it runs, or change engine.base_url")
    said = said_by(error, key)
    if isinstance(error, MalformedReply):
        return AlignError(f"engine {server}: {said} ({gave_up}; `align engine check` shows what the server can do)")
    if isinstance(error, openai.RateLimitError | openai.InternalServerError):
        delay = requested_delay(error) or 0.0
        quota = f"the server asks to wait {delay:.0f} seconds; {resume} after that"
        return AlignError(f"engine {server}: {said} ({quota if delay > MAX_REQUESTED_DELAY else gave_up})")
    return InputError(f"engine {server}: refused the request: {said}")
