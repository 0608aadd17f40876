"""The engine that asks an OpenAI-compatible server: OpenAI's own, or vLLM, SGLang, llama.cpp and others."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, TypeVar

import openai

from align.config import EngineBlock
from align.data.chat import with_system_prompt
from align.errors import AlignError, InputError
from align.generation import ChoiceRequest, ChoiceScores, Completed, Progress, Request, unheard
from align.records import FinishReason, as_dicts

TOP_LOGPROBS = 20
"""Alternatives asked for; the most that the protocol allows."""

Asked = TypeVar("Asked", Request, ChoiceRequest)
Answered = TypeVar("Answered")


class OpenAIBackend:
    """Completions and single-token choices from a server, `concurrency` requests at a time.

    Requests that meet a rate limit, a fault of the server or a timeout are tried again with growing pauses,
    `max_retries` times.
    """

    depends_on_batch = False

    def __init__(self, engine: EngineBlock, *, system_prompt: str | None = None) -> None:
        if not engine.model:
            raise InputError("engine.model: a server needs the name of the model it serves")
        self.name = f"openai:{engine.model}"
        self._engine = engine
        self._system_prompt = system_prompt
        self._key = os.environ.get(engine.api_key_env, "")
        if not self._key and engine.base_url is None:
            raise InputError(
                f"engine.api_key_env: the environment variable {engine.api_key_env} is not set; export the key in it, "
                "or name a server of your own in engine.base_url"
            )
        self._client = openai.OpenAI(
            api_key=self._key or "none",
            base_url=engine.base_url,
            timeout=engine.timeout_seconds,
            max_retries=engine.max_retries,
        )

    def complete(self, requests: Sequence[Request], progress: Progress = unheard) -> Iterator[Completed]:
        """Complete each request once; results come as they finish."""
        return self._each(self._complete, requests)

    def choice_logprobs(
        self, requests: Sequence[ChoiceRequest], progress: Progress = unheard
    ) -> Iterator[ChoiceScores]:
        """Score choices of one short token each by the server's alternatives for the first token.

        Raises:
            InputError: a choice is longer than a letter or a word, or the server gives no log-probabilities.
        """
        for request in requests:
            for choice in request.choices:
                if len(choice.split()) != 1 or len(choice) > 12:
                    raise InputError(
                        f"engine {self.name}: a server shows the log-probabilities of the next token alone, so it "
                        f"cannot score the text {choice[:40]!r}; use `judge.kind: choice`, or `engine.kind: local`"
                    )
        return self._each(self._choose, requests)

    def _each(self, answer: Callable[[Asked], Answered], requests: Sequence[Asked]) -> Iterator[Answered]:
        pool = ThreadPoolExecutor(max_workers=self._engine.concurrency)
        try:
            for future in as_completed([pool.submit(answer, request) for request in requests]):
                yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _complete(self, request: Request) -> Completed:
        answer = self._ask(
            request,
            request.max_new_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed % 2**31,
        )
        text = (answer.choices[0].message.content or "").removeprefix(request.prefill)
        tokens = answer.usage.completion_tokens if answer.usage else len(text.split())
        # Anything but a stop (a length limit, a content filter) left a text that is not whole.
        reason: FinishReason = "stop" if answer.choices[0].finish_reason == "stop" else "length"
        return Completed(request.id, text, reason, tokens)

    def _choose(self, request: ChoiceRequest) -> ChoiceScores:
        answer = self._ask(request, 1, temperature=1.0, logprobs=True, top_logprobs=TOP_LOGPROBS)
        shown = answer.choices[0].logprobs
        if shown is None or not shown.content:
            raise InputError(
                f"engine {self.name}: the server gave no log-probabilities, which `judge.kind: choice` needs; "
                "switch them on in the server, use another, or use `engine.kind: local`"
            )
        alternatives = [(each.token.strip(), each.logprob) for each in shown.content[0].top_logprobs]
        logprobs = tuple(
            _log_sum_exp([logprob for token, logprob in alternatives if token == choice.strip()])
            for choice in request.choices
        )
        return ChoiceScores(request.id, logprobs, (1,) * len(request.choices))

    def _ask(self, request: Request | ChoiceRequest, max_new_tokens: int, **options: Any) -> Any:
        # OpenAI's newer models refuse the old name of the limit, which is the one that other servers know.
        options["max_completion_tokens" if self._engine.base_url is None else "max_tokens"] = max_new_tokens
        messages: list[Any] = [*as_dicts(with_system_prompt(request.messages, self._system_prompt))]
        if request.prefill:
            messages.append({"role": "assistant", "content": request.prefill})
            # Understood by vLLM and SGLang; llama.cpp goes on with a last assistant's message by itself.
            options["extra_body"] = {"continue_final_message": True, "add_generation_prompt": False}
        try:
            return self._client.chat.completions.create(model=str(self._engine.model), messages=messages, **options)
        except openai.OpenAIError as error:
            raise self._explained(error) from None

    def _explained(self, error: openai.OpenAIError) -> AlignError:
        """The fault, where it is and the remedy; never what might hold the key."""
        server = self._engine.base_url or "https://api.openai.com"
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            return InputError(f"engine {server}: refused the key; check the variable {self._engine.api_key_env}")
        if isinstance(error, openai.NotFoundError):
            return InputError(
                f"engine {server}: has no model {self._engine.model!r}, or is not such a server; "
                "check engine.model and engine.base_url (which mostly ends in /v1)"
            )
        tried = f"after {self._engine.max_retries} retries; what was finished is kept: run the same command again"
        if isinstance(error, openai.APITimeoutError):
            return AlignError(f"engine {server}: no answer in {self._engine.timeout_seconds:g} seconds, {tried}")
        if isinstance(error, openai.APIConnectionError):
            return InputError(f"engine {server}: cannot be reached, {tried} once it runs, or change engine.base_url")
        said = str(error).replace(self._key, "***") if self._key else str(error)
        if isinstance(error, openai.RateLimitError | openai.InternalServerError):
            return AlignError(f"engine {server}: {said[:300]} ({tried})")
        return InputError(f"engine {server}: refused the request: {said[:300]}")


def _log_sum_exp(logprobs: Sequence[float]) -> float:
    if not logprobs:
        return -math.inf
    peak = max(logprobs)
    return peak + math.log(sum(math.exp(logprob - peak) for logprob in logprobs))
