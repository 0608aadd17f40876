"""How choices are scored by a server: by the alternatives for a token, by a vote, or as given texts.

Servers differ in what they show, and some show it wrongly: what they can do is found out by asking them.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import openai

from align.data.chat import prompt_text, token_ids
from align.engines.engine import ChoiceRequest, ChoiceScores, Request
from align.engines.server_faults import MalformedReply, passes
from align.engines.server_replies import ChatReply, ScoredReply
from align.errors import InputError
from align.records import Message
from align.run.reproducibility import derive_seed

if TYPE_CHECKING:
    from align.engines.openai_server import OpenAIEngine

ALTERNATIVES = (20, 5)
"""How many are asked for: the most that the protocol allows, then what stricter servers give."""

VOTE_TOKENS = 5
"""A vote is its first word, which may stand behind a bracket or a quotation mark."""

MOST_DIFFERENCE = 0.25
"""Nats a token by which a server may differ from itself on the same text, written and given."""

LETTERS_QUESTION = (Message("user", "Which letter comes first in the alphabet? Answer with one letter, A or B."),)
TEXT_QUESTION = (Message("user", "Name three animals."),)


async def most_alternatives(engine: "OpenAIEngine") -> int:
    """How many alternatives for the next token the server shows; 0 where it shows no log-probabilities."""
    question = ChoiceRequest("alternatives", LETTERS_QUESTION, ("A", "B"))
    for count in ALTERNATIVES:
        try:
            reply = await _next_token(engine, question, count)
        except MalformedReply:
            continue
        except openai.APIStatusError as error:
            # A missing model or a bad key is no answer to the question.
            if passes(error) or error.status_code in (401, 403, 404):
                raise
            continue
        if len(reply.alternatives) > 1:
            return min(count, len(reply.alternatives))
    return 0


async def by_alternatives(engine: "OpenAIEngine", request: ChoiceRequest) -> ChoiceScores:
    """Each choice's log-probability as the next token, over the ways in which spaces may stand around it.

    A choice that is not among the alternatives, where another is, gets the most that it can have: the least that is
    shown, and no more than its part of what is left. To take it for impossible would make its rival certain.

    Raises:
        MalformedReply: the server gave none, though it had given some before.
    """
    alternatives = (await _next_token(engine, request, engine.alternatives, ScoredReply)).alternatives
    logprobs = tuple(
        _log_sum_exp([logprob for word, logprob in alternatives if word == choice.strip()])
        for choice in request.choices
    )
    hidden = logprobs.count(-math.inf)
    if 0 < hidden < len(logprobs):
        most = _most_of_hidden([logprob for _, logprob in alternatives], hidden)
        logprobs = tuple(max(logprob, most) for logprob in logprobs)
    return ChoiceScores(request.id, logprobs, (1,) * len(request.choices))


def _most_of_hidden(shown: Sequence[float], hidden: int) -> float:
    left = max(0.0, 1 - sum(map(math.exp, shown))) / hidden
    return min(*shown, math.log(left) if left else -math.inf)


async def by_vote(engine: "OpenAIEngine", request: ChoiceRequest) -> ChoiceScores:
    """The choices' log-probabilities as estimated from samples at temperature 1, each with a seed of its own."""
    votes = []
    for number in range(engine.block.votes):
        seed = derive_seed(0, "vote", request.id, number) % 2**31
        reply = await engine.chat(request, VOTE_TOKENS, temperature=1.0, top_p=1.0, seed=seed)
        votes.append(_first_word(reply.text.removeprefix(request.prefill)))
    return ChoiceScores(request.id, counted(votes, request.choices), (1,) * len(request.choices))


def counted(votes: Sequence[str], choices: Sequence[str]) -> tuple[float, ...]:
    """Log-probabilities of the choices from the votes for them.

    The share of votes that name a choice at all is divided by the posterior mean under Jeffreys' prior, (n_i + 1/2) /
    (n + m/2) for m choices: a handful of samples never makes a choice certain. Votes for nothing leave -inf.
    """
    names = Counter(votes)
    counts = [names[choice.strip()] for choice in choices]
    valid = sum(counts)
    if not valid:
        return (-math.inf,) * len(choices)
    share = valid / len(votes)
    return tuple(math.log(share * (count + 0.5) / (valid + 0.5 * len(choices))) for count in counts)


async def of_texts(engine: "OpenAIEngine", request: ChoiceRequest) -> ChoiceScores:
    """The log-probability of each choice as the assistant's words.

    Raises:
        InputError: the server does not show the log-probabilities of a given text.
    """
    by_token = [await _logprobs_of_text(engine, request, choice) for choice in request.choices]
    return ChoiceScores(request.id, tuple(map(sum, by_token)), tuple(map(len, by_token)))


async def check_scoring(engine: "OpenAIEngine") -> None:
    """Compare what the server says of a text that it has written itself with what it said while writing it.

    Some servers echo a text with the log-probabilities moved by a token; a wrong `engine.tokenizer` shows here too.

    Raises:
        InputError: it gives no log-probabilities of a given text, or others than it gave before.
    """
    written = await engine.chat(Request("written", TEXT_QUESTION, 0, 8), 8, temperature=0.0, **_shown(engine))
    words = "".join(token.token for token in written.tokens)
    text = written.text if words.startswith(written.text) else ""
    given = await _logprobs_of_text(engine, ChoiceRequest("given", TEXT_QUESTION, ()), text or "A cat.")
    before = [token.logprob for token in written.tokens][: len(given)]
    if not text or len(before) != len(given):
        return
    difference = sum(abs(a - b) for a, b in zip(before, given, strict=True)) / max(len(given), 1)
    if difference > MOST_DIFFERENCE:
        raise InputError(
            f"engine {engine.name}: the log-probabilities that the server gives of a given text differ from those "
            f"that it gave when it wrote it by {difference:.2f} nats a token; check that engine.tokenizer is the "
            "served model's, or use `judge.kind: choice`, or `engine.kind: local`"
        )


def _shown(engine: "OpenAIEngine") -> dict[str, Any]:
    return {"logprobs": True, "top_logprobs": engine.alternatives} if engine.alternatives else {}


async def _next_token(
    engine: "OpenAIEngine", request: ChoiceRequest, count: int, shape: type[ChatReply] = ChatReply
) -> ChatReply:
    return await engine.chat(request, 1, shape, temperature=1.0, logprobs=True, top_logprobs=count)


async def _logprobs_of_text(engine: "OpenAIEngine", request: ChoiceRequest, text: str) -> list[float]:
    if engine.block.tokenizer:
        return await _by_echo(engine, request, text)
    return await _by_prompt_logprobs(engine, request, text)


async def _by_prompt_logprobs(engine: "OpenAIEngine", request: ChoiceRequest, text: str) -> list[float]:
    """By vLLM's `prompt_logprobs`: those of the conversation with the text, less those of the one without."""
    with_text = ChoiceRequest(request.id, request.messages, (), prefill=request.prefill + text)
    try:
        whole = await engine.chat(with_text, 1, temperature=0.0, extra_body={"prompt_logprobs": 0})
    except (openai.BadRequestError, openai.UnprocessableEntityError):
        raise _cannot_score(engine) from None
    logprobs = whole.given_logprobs
    if logprobs is None:
        raise _cannot_score(engine)
    without = ChoiceRequest(request.id, request.messages, (), prefill=request.prefill)
    before = (await engine.chat(without, 1, temperature=0.0)).usage
    if before is None or not before.prompt_tokens < len(logprobs):
        raise MalformedReply("counts the tokens of a prompt otherwise than it shows them")
    return logprobs[before.prompt_tokens :]


async def _by_echo(engine: "OpenAIEngine", request: ChoiceRequest, text: str) -> list[float]:
    """By a completion that echoes the prompt, which `engine.tokenizer` has put into the chat's form."""
    tokenizer = engine.tokenizer
    prompt = prompt_text(tokenizer, request.messages, engine.system_prompt, request.prefill)
    reply = await engine.echo(prompt + text)
    shown = reply.choices[0].logprobs
    if shown is None:
        raise _cannot_score(engine)
    made = reply.usage.completion_tokens if reply.usage else 1
    end = len(shown.tokens) - made
    start = end - len(token_ids(tokenizer, text))
    if start < 0 or _ascii("".join(shown.tokens[start:end])) != _ascii(text):
        raise InputError(
            f"engine {engine.name}: the server cuts a text into other tokens than engine.tokenizer "
            f"{engine.block.tokenizer!r}; name the served model's, or use `judge.kind: choice`"
        )
    return [logprob or 0.0 for logprob in shown.token_logprobs[start:end]]


def _cannot_score(engine: "OpenAIEngine") -> InputError:
    return InputError(
        f"engine {engine.name}: the server does not show the log-probabilities of a given text; use "
        "`judge.kind: choice`, `engine.kind: local`, vLLM, or, where the server can echo completions "
        "(llama-cpp-python), name the served model's tokenizer in engine.tokenizer"
    )


def _first_word(text: str) -> str:
    found = re.search(r"\w+", text)
    return found.group() if found else ""


def _ascii(text: str) -> str:
    """What no cut between the bytes of a character has changed."""
    return re.sub(r"[^\x21-\x7e]", "", text)


def _log_sum_exp(logprobs: Sequence[float]) -> float:
    if not logprobs:
        return -math.inf
    peak = max(logprobs)
    return peak + math.log(sum(math.exp(logprob - peak) for logprob in logprobs))
