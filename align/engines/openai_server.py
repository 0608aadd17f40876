"""The engine that asks an OpenAI-compatible server: OpenAI's own, or vLLM, SGLang, TGI, llama.cpp and others."""

import asyncio
import os
import queue
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, TypeVar

import openai

from align.data.chat import with_system_prompt
from align.engines import server_scores
from align.engines.engine import ChoiceRequest, ChoiceScores, Completed, EngineIdentity, Progress, Request, unheard
from align.engines.server_faults import MalformedReply, explained, try_until_answered
from align.engines.server_replies import ChatReply, ListedModel, ModelList, Reply, TextReply, read_reply
from align.errors import AlignError, InputError
from align.records import as_dicts
from align.run import processes
from align.settings.blocks import EngineBlock

LONGEST_WORD = 12
"""Characters of a choice that the alternatives for one token may hold."""

Asked = TypeVar("Asked", Request, ChoiceRequest)
Answered = TypeVar("Answered")
Shape = TypeVar("Shape", bound=Reply)


class OpenAIEngine:
    """Completions and log-probabilities from a server, at most `concurrency` requests at a time.

    A request that meets a rate limit, a fault of the server, a timeout or a broken reply is tried again with growing
    pauses, `max_retries` times, and keeps its place meanwhile: a server in trouble is asked less. Once one has failed
    for good no other is begun, and those under way are still handed over. Several processes share the bound.
    """

    depends_on_batch = False

    def __init__(self, block: EngineBlock, *, system_prompt: str | None = None) -> None:
        if not block.model:
            raise InputError("engine.model: a server needs the name of the model it serves")
        self.name = f"openai:{block.model}"
        self.block = block
        self.system_prompt = system_prompt
        self._key = os.environ.get(block.api_key_env, "")
        if not self._key and block.base_url is None:
            raise InputError(
                f"engine.api_key_env: the environment variable {block.api_key_env} is not set; export the key in it, "
                "or name a server of your own in block.base_url"
            )
        self._client = openai.AsyncOpenAI(
            api_key=self._key or "none",
            base_url=block.base_url,
            timeout=block.timeout_seconds,
            max_retries=0,
            # On a connection that is used again, a reply that a server or proxy sent twice is taken for the answer to
            # the next request. A new connection is nothing beside a completion.
            default_headers={"Connection": "close"},
        )
        self._places = asyncio.Semaphore(_share_of_bound(block.concurrency))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._alternatives: int | None = None
        self._has_scored = False
        self._tokenizer: Any = None

    @property
    def alternatives(self) -> int:
        """How many alternatives for the next token the server shows; 0 where choices are put to the vote.

        It is asked once, by a request of its own.

        Raises:
            AlignError: the server does not answer, or refuses.
        """
        if self._alternatives is None:
            self._alternatives = self.ask(server_scores.most_alternatives(self))
        return self._alternatives

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of `engine.tokenizer`, loaded at first use."""
        if self._tokenizer is None:
            from align.models.loading import load_tokenizer

            self._tokenizer = load_tokenizer(str(self.block.tokenizer))
        return self._tokenizer

    @property
    def choice_method(self) -> str:
        """How choices of one word are scored, in words."""
        return "log-probabilities" if self.alternatives else f"vote of {self.block.votes} samples"

    def identity(self) -> EngineIdentity:
        """The name that the recipe asks for, and what the server says of it; nothing where it lists no models."""
        listed = self.ask(self._listed_if_any())
        own = [each for each in listed if each.id == self.block.model] or listed
        return EngineIdentity("server", str(self.block.model), said=_said(own[0]) if len(own) == 1 else {})

    def complete(
        self, requests: Sequence[Request], progress: Progress = unheard, at_once: int | None = None
    ) -> Iterator[Completed]:
        """Complete each request once; results come as they finish."""
        return self._each(self._complete, requests)

    def choice_logprobs(
        self, requests: Sequence[ChoiceRequest], progress: Progress = unheard
    ) -> Iterator[ChoiceScores]:
        """Score choices: words by the alternatives for one token or by a vote, whole texts where the server can.

        Raises:
            InputError: the server gives no log-probabilities of a given text, or wrong ones.
        """
        alternatives = self.alternatives
        if all(_is_word(choice) for request in requests for choice in request.choices):
            score = server_scores.by_alternatives if alternatives else server_scores.by_vote
            return self._each(lambda request: score(self, request), requests)
        if not self._has_scored:
            self.ask(server_scores.check_scoring(self))
            self._has_scored = True
        return self._each(lambda request: server_scores.of_texts(self, request), requests)

    def models(self) -> list[str]:
        """The models that the server lists."""
        return [model.id for model in self.ask(self._listed())]

    async def _listed(self) -> tuple[ListedModel, ...]:
        listed = self._client.models.with_raw_response.list
        return (await self._reply(ModelList, listed)).data

    async def _listed_if_any(self) -> tuple[ListedModel, ...]:
        """The same; none where the server does not know the question, refuses it or answers something else."""
        try:
            return await self._listed()
        except (openai.APIStatusError, MalformedReply):
            return ()

    def ask(self, question: Awaitable[Answered]) -> Answered:
        """What comes of a coroutine on this engine's loop."""

        async def awaited() -> Answered:
            return await question

        try:
            return asyncio.run_coroutine_threadsafe(awaited(), self._running_loop()).result()
        except Exception as error:
            raise self.told(error) from None

    async def chat(
        self,
        request: Request | ChoiceRequest,
        max_new_tokens: int,
        shape: type[ChatReply] = ChatReply,
        **options: Any,
    ) -> ChatReply:
        """The reply to a conversation, checked; tried again as the engine's settings say."""
        messages = as_dicts(with_system_prompt(request.messages, self.system_prompt))
        extra = {**self.block.extra, **options.pop("extra_body", {})}
        if request.prefill:
            messages.append({"role": "assistant", "content": request.prefill})
            # Understood by vLLM and SGLang; llama.cpp's own server goes on with a last assistant's message by itself.
            extra |= {"continue_final_message": True, "add_generation_prompt": False}
        # OpenAI's newer models refuse the old name of the limit, which is the one that other servers know.
        options["max_completion_tokens" if self.block.base_url is None else "max_tokens"] = max_new_tokens
        create: Any = self._client.chat.completions.with_raw_response.create
        return await self._reply(
            shape, lambda: create(model=self.block.model, messages=messages, extra_body=extra, **options)
        )

    async def echo(self, prompt: str) -> TextReply:
        """The reply to a text that the server is asked to repeat with the log-probability of each token."""
        create: Any = self._client.completions.with_raw_response.create
        options = {"max_tokens": 1, "temperature": 0.0, "echo": True, "logprobs": 1}
        return await self._reply(TextReply, lambda: create(model=self.block.model, prompt=prompt, **options))

    def told(self, error: Exception) -> Exception:
        """A fault as the person is told it; those of this program are left as they are."""
        if isinstance(error, AlignError):
            return error
        return explained(error, self.block, self._key)

    async def _complete(self, request: Request) -> Completed:
        reply = await self.chat(
            request,
            request.max_new_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed % 2**31,
        )
        text = reply.text.removeprefix(request.prefill)
        tokens = reply.usage.completion_tokens if reply.usage else len(text.split())
        return Completed(request.id, text, reply.finish_reason, tokens)

    async def _reply(self, shape: type[Shape], send: Callable[[], Awaitable[Any]]) -> Shape:
        async def once() -> Shape:
            return read_reply(shape, (await send()).http_response.content)

        return await self._tried(once)

    async def _tried(self, once: Callable[[], Awaitable[Answered]]) -> Answered:
        return await try_until_answered(once, retries=self.block.max_retries, seconds=self.block.timeout_seconds)

    def _each(self, answer: Callable[[Asked], Awaitable[Answered]], requests: Sequence[Asked]) -> Iterator[Answered]:
        results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        work = asyncio.run_coroutine_threadsafe(self._answer_all(answer, requests, results), self._running_loop())
        try:
            while (result := results.get()) is not _END:
                if isinstance(result, Exception):
                    raise self.told(result) from None
                yield result
        finally:
            work.cancel()

    async def _answer_all(
        self,
        answer: Callable[[Asked], Awaitable[Answered]],
        requests: Sequence[Asked],
        results: "queue.SimpleQueue[Any]",
    ) -> None:
        """Put each answer into the queue as it comes, then the first fault or the end."""
        faults: list[Exception] = []

        async def answered(request: Asked) -> None:
            async with self._places:
                if faults:
                    return
                try:
                    results.put(await answer(request))
                except Exception as error:
                    faults.append(error)

        await asyncio.gather(*(answered(request) for request in requests))
        results.put(faults[0] if faults else _END)

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        """A loop in a thread of its own, so that replies are read and timed while the caller does other things."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name=self.name, daemon=True).start()
        return self._loop


_END = object()


def _said(listed: ListedModel) -> dict[str, str]:
    """What tells models apart of an entry in a server's list; a path on the server's disk by its last part alone."""
    found = listed.model_dump()
    return {key: value.rpartition("/")[2] if value.startswith("/") else value for key, value in found.items() if value}


def _is_word(choice: str) -> bool:
    return len(choice.split()) == 1 and len(choice) <= LONGEST_WORD


def _share_of_bound(concurrency: int) -> int:
    """This process's part of the requests that all may have under way together.

    Raises:
        InputError: there are more processes than requests allowed.
    """
    parts, number = processes.world_size(), processes.rank()
    if parts > concurrency:
        raise InputError(
            f"engine.concurrency: {concurrency} requests at a time cannot be shared out among {parts} processes; "
            "raise it, or start fewer"
        )
    return concurrency // parts + (number < concurrency % parts)
