"""How choices are scored by a server: by the alternatives for one token, by a vote of samples, or as given texts.

Servers differ in which log-probabilities they show, and some show wrong ones. What a server can do is found out by
sending it test requests.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

import openai

from align.data.chat import prompt_text, token_ids
from align.engines.engine import ChoiceRequest, ChoiceScores, Request
from align.engines.server_faults import MalformedReply, is_transient
from align.engines.server_refusals import prompt_refusal
from align.engines.server_replies import ChatReply, ScoredReply, TextReply
from align.errors import InputError
from align.records import Message
from align.run.reproducibility import derive_seed
from align.settings.blocks import EngineBlock

ALTERNATIVES = (20, 5)
"""Numbers of alternatives to ask for: the protocol's maximum, then that of stricter servers."""

VOTE_TOKENS = 5
"""Tokens of a sampled vote. The vote is its first word, which may follow a bracket or a quotation mark."""

MAX_DIFFERENCE = 0.25
"""Nats per token by which a server's scores of a text that it generated and of the same text as input may differ."""

LETTERS_QUESTION = (Message("user", "Which letter comes first in the alphabet? Answer with one letter, A or B."),)
TEXT_QUESTION = (Message("user", "Name three animals."),)


class Server(Protocol):
    """What scoring needs of a server engine."""

    name: str
    block: EngineBlock
    system_prompt: str | None

    @property
    def alternatives(self) -> int: ...
    @property
    def tokenizer(self) -> Any: ...
    async def chat(
        self, request: Request | ChoiceRequest, max_new_tokens: int, shape: type[ChatReply] = ..., **options: Any
    ) -> ChatReply: ...
    async def echo(self, prompt: str) -> TextReply: ...


async def count_alternatives(server: Server) -> int:
    """How many alternatives for the next token the server shows; 0 if it shows no log-probabilities."""
    question = ChoiceRequest("alternatives", LETTERS_QUESTION, ("A", "B"))
    for count in ALTERNATIVES:
        try:
            reply = await _next_token(server, question, count)
        except MalformedReply:
            continue
        except openai.APIStatusError as error:
            # A missing model or a rejected key says nothing about log-probabilities.
            if is_transient(error) or error.status_code in (401, 403, 404):
                raise
            continue
        if len(reply.alternatives) > 1:
            return min(count, len(reply.alternatives))
    return 0


async def score_by_alternatives(server: Server, request: ChoiceRequest) -> ChoiceScores:
    """Each choice's log-probability as the next token, summed over its variants with white space around it.

    A choice that is not among the alternatives, while another one is, gets the upper bound of its probability: that of
    the least likely alternative, and at most an equal share of the mass that the alternatives leave. With -inf the
    other choice would become certain.

    Raises:
        MalformedReply: the reply has no log-probabilities, though the server has shown some before.
    """
    alternatives = (await _next_token(server, request, server.alternatives, ScoredReply)).alternatives
    logprobs = tuple(
        _log_sum_exp([logprob for word, logprob in alternatives if word == choice.strip()])
        for choice in request.choices
    )
    hidden = logprobs.count(-math.inf)
    if 0 < hidden < len(logprobs):
        bound = _bound_of_hidden([logprob for _, logprob in alternatives], hidden)
        logprobs = tuple(max(logprob, bound) for logprob in logprobs)
    return ChoiceScores(request.id, logprobs, (1,) * len(request.choices))


def _bound_of_hidden(shown: Sequence[float], hidden: int) -> float:
    share = max(0.0, 1 - sum(map(math.exp, shown))) / hidden
    return min(*shown, math.log(share) if share else -math.inf)


async def score_by_vote(server: Server, request: ChoiceRequest) -> ChoiceScores:
    """The choices' log-probabilities, estimated from samples at temperature 1 with different seeds."""
    votes = []
    for number in range(server.block.votes):
        seed = derive_seed(0, "vote", request.id, number) % 2**31
        reply = await server.chat(request, VOTE_TOKENS, temperature=1.0, top_p=1.0, seed=seed)
        votes.append(_first_word(reply.text.removeprefix(request.prefill)))
    return ChoiceScores(request.id, vote_logprobs(votes, request.choices), (1,) * len(request.choices))


def vote_logprobs(votes: Sequence[str], choices: Sequence[str]) -> tuple[float, ...]:
    """Log-probabilities of the choices, from the votes for them.

    The share of votes that name any choice is divided among the choices by the posterior mean under Jeffreys' prior:
    (n_i + 1/2) / (n + m/2) for m choices. So a few samples never make a choice certain. Without a vote for any choice,
    each gets -inf.
    """
    names = Counter(votes)
    counts = [names[choice.strip()] for choice in choices]
    valid = sum(counts)
    if not valid:
        return (-math.inf,) * len(choices)
    share = valid / len(votes)
    return tuple(math.log(share * (count + 0.5) / (valid + 0.5 * len(choices))) for count in counts)


async def score_texts(server: Server, request: ChoiceRequest) -> ChoiceScores:
    """The log-probability of each choice as the assistant's answer.

    Raises:
        InputError: the server does not show the log-probabilities of a given text.
    """
    by_token = [await _text_logprobs(server, request, choice) for choice in request.choices]
    return ChoiceScores(request.id, tuple(map(sum, by_token)), tuple(map(len, by_token)))


async def check_text_scoring(server: Server) -> None:
    """Compare the log-probabilities that the server shows while generating a text with those of the same text as input.

    This detects servers that echo a text with its log-probabilities shifted by a token, and a wrong `engine.tokenizer`.

    Raises:
        InputError: the server shows no log-probabilities of a given text, or different ones.
    """
    options: dict[str, Any] = {"logprobs": True, "top_logprobs": server.alternatives} if server.alternatives else {}
    written = await server.chat(Request("written", TEXT_QUESTION, 0, 8), 8, temperature=0.0, **options)
    words = "".join(token.token for token in written.tokens)
    text = written.text if words.startswith(written.text) else ""
    given = await _text_logprobs(server, ChoiceRequest("given", TEXT_QUESTION, ()), text or "A cat.")
    generated = [token.logprob for token in written.tokens][: len(given)]
    if not text or len(generated) != len(given):
        return
    difference = sum(abs(a - b) for a, b in zip(generated, given, strict=True)) / max(len(given), 1)
    if difference > MAX_DIFFERENCE:
        raise InputError(
            f"engine {server.name}: the server's log-probabilities of a text as input differ from those that it showed "
            f"while generating the same text, by {difference:.2f} nats per token; check that engine.tokenizer is the "
            "served model's, or use `judge.kind: choice`, or `engine.kind: local`"
        )


async def _next_token(
    server: Server, request: ChoiceRequest, count: int, shape: type[ChatReply] = ChatReply
) -> ChatReply:
    return await server.chat(request, 1, shape, temperature=1.0, logprobs=True, top_logprobs=count)


async def _text_logprobs(server: Server, request: ChoiceRequest, text: str) -> list[float]:
    return await (_by_echo if server.block.tokenizer else _by_prompt_logprobs)(server, request, text)


async def _by_prompt_logprobs(server: Server, request: ChoiceRequest, text: str) -> list[float]:
    """By vLLM's `prompt_logprobs` of the conversation with the text, cut at the length of the one without it."""
    with_text = ChoiceRequest(request.id, request.messages, (), prefill=request.prefill + text)
    try:
        whole = await server.chat(with_text, 1, temperature=0.0, extra_body={"prompt_logprobs": 0})
    except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
        if prompt_refusal(error, ""):
            raise
        raise _cannot_score(server) from None
    logprobs = whole.prompt_token_logprobs
    if logprobs is None:
        raise _cannot_score(server)
    without = ChoiceRequest(request.id, request.messages, (), prefill=request.prefill)
    usage = (await server.chat(without, 1, temperature=0.0)).usage
    if usage is None or not usage.prompt_tokens < len(logprobs):
        raise MalformedReply("the reported number of prompt tokens does not fit the prompt's log-probabilities")
    return logprobs[usage.prompt_tokens :]


async def _by_echo(server: Server, request: ChoiceRequest, text: str) -> list[float]:
    """By a completion that echoes the prompt, which `engine.tokenizer` renders with its chat template."""
    tokenizer = server.tokenizer
    prompt = prompt_text(tokenizer, request.messages, server.system_prompt, request.prefill)
    reply = await server.echo(prompt + text)
    echoed = reply.choices[0].logprobs
    if echoed is None:
        raise _cannot_score(server)
    generated = reply.usage.completion_tokens if reply.usage else 1
    end = len(echoed.tokens) - generated
    start = end - len(token_ids(tokenizer, text))
    if start < 0 or _ascii("".join(echoed.tokens[start:end])) != _ascii(text):
        raise InputError(
            f"engine {server.name}: the server splits a text into other tokens than engine.tokenizer "
            f"{server.block.tokenizer!r}; name the served model's tokenizer, or use `judge.kind: choice`"
        )
    return [logprob or 0.0 for logprob in echoed.token_logprobs[start:end]]


def _cannot_score(server: Server) -> InputError:
    return InputError(
        f"engine {server.name}: the server does not show the log-probabilities of a given text; use "
        "`judge.kind: choice`, `engine.kind: local`, vLLM, or, where the server can echo completions "
        "(llama-cpp-python), name the served model's tokenizer in engine.tokenizer"
    )


def _first_word(text: str) -> str:
    found = re.search(r"\w+", text)
    return found.group() if found else ""


def _ascii(text: str) -> str:
    """The visible ASCII characters: a token boundary inside a multi-byte character does not garble these."""
    return re.sub(r"[^\x21-\x7e]", "", text)


def _log_sum_exp(logprobs: Sequence[float]) -> float:
    if not logprobs:
        return -math.inf
    peak = max(logprobs)
    return peak + math.log(sum(math.exp(logprob - peak) for logprob in logprobs))
