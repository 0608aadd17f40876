"""The engine that queries an OpenAI-compatible server: OpenAI's own, vLLM, SGLang, TGI, llama.cpp and others."""

import asyncio
import os
import queue
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

import openai

from align.data.answers import answer_in_text
from align.data.chat import with_system_prompt
from align.engines import server_scores
from align.engines.engine import ChoiceRequest, ChoiceScores, Completed, EngineIdentity, Progress, Request, no_progress
from align.engines.server_faults import MalformedReply, as_align_error, with_retries
from align.engines.server_refusals import held_until_answered, prompt_refusal, refused_completion, refused_scores
from align.engines.server_replies import ChatReply, ListedModel, ModelList, Reply, TextReply, read_reply
from align.errors import AlignError, InputError
from align.records import as_dicts
from align.run import processes
from align.settings.blocks import EngineBlock

MAX_WORD_LENGTH = 12
"""Characters. Longer choices are scored as texts, since the alternatives for one token cannot hold them."""

RequestT = TypeVar("RequestT", Request, ChoiceRequest)
Answer = TypeVar("Answer")
AnswerT = TypeVar("AnswerT", Completed, ChoiceScores)
Shape = TypeVar("Shape", bound=Reply)


class OpenAIEngine:
    """Completions and log-probabilities from a server, at most `concurrency` requests at a time.

    After a rate limit, a server error, a timeout or a broken reply, a request is retried with growing delays up to
    `max_retries` times. Meanwhile it keeps its slot, so that an overloaded server gets fewer requests. Once a request
    has failed for good, no other is started; answers to those in flight are still yielded. The processes of a stage
    share the `concurrency`.
    """

    depends_on_batch = False

    def __init__(self, block: EngineBlock, *, system_prompt: str | None = None) -> None:
        if not block.model:
            raise InputError("engine.model: not set; name the model that the server serves")
        self.name = f"openai:{block.model}"
        self.block = block
        self.system_prompt = system_prompt
        self._key = os.environ.get(block.api_key_env, "")
        if not self._key and block.base_url is None:
            raise InputError(
                f"engine.api_key_env: the environment variable {block.api_key_env} is not set; export the key in it, "
                "or give your own server's address in engine.base_url"
            )
        self._client = openai.AsyncOpenAI(
            api_key=self._key or "none",
            base_url=block.base_url,
            timeout=block.timeout_seconds,
            max_retries=0,
            # On a reused connection, a reply that a server or proxy sent twice would be read as the answer to the next
            # request. A new connection costs little compared with a completion.
            default_headers={"Connection": "close"},
        )
        self._slots = asyncio.Semaphore(_share_of_concurrency(block.concurrency))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._alternatives: int | None = None
        self._can_score_texts = False
        self._tokenizer: Any = None

    @property
    def alternatives(self) -> int:
        """How many alternatives for the next token the server shows; 0 if choices are scored by vote.

        The first access sends the server a test request.

        Raises:
            AlignError: the server does not answer, or refuses.
        """
        if self._alternatives is None:
            self._alternatives = self._run(server_scores.count_alternatives(self))
        return self._alternatives

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that `engine.tokenizer` names, loaded at first use."""
        if self._tokenizer is None:
            from align.models.loading import load_tokenizer

            self._tokenizer = load_tokenizer(str(self.block.tokenizer))
        return self._tokenizer

    @property
    def choice_method(self) -> str:
        """How one-word choices are scored, in words."""
        return "log-probabilities" if self.alternatives else f"vote of {self.block.votes} samples"

    def identity(self) -> EngineIdentity:
        """The model's name in the recipe and the server's description of it, which is empty if it lists no models."""
        listed = self._run(self._list_models_if_possible())
        own = [each for each in listed if each.id == self.block.model] or listed
        return EngineIdentity("server", str(self.block.model), said=_description(own[0]) if len(own) == 1 else {})

    def complete(
        self, requests: Sequence[Request], progress: Progress = no_progress, at_once: int | None = None
    ) -> Iterator[Completed]:
        """Complete each request once. Results come as they finish, and `progress` and `at_once` are not used."""
        return self._answers(self._complete, requests, refused_completion)

    def choice_logprobs(
        self, requests: Sequence[ChoiceRequest], progress: Progress = no_progress
    ) -> Iterator[ChoiceScores]:
        """Score words by the alternatives for one token or by vote, and longer texts by their own log-probabilities.

        Raises:
            InputError: the server shows no log-probabilities of a given text, or wrong ones.
        """
        alternatives = self.alternatives
        if all(_is_word(choice) for request in requests for choice in request.choices):
            score = server_scores.score_by_alternatives if alternatives else server_scores.score_by_vote
            return self._scores(lambda request: score(self, request), requests)
        if not self._can_score_texts:
            self._run(server_scores.check_text_scoring(self))
            self._can_score_texts = True
        return self._scores(lambda request: server_scores.score_texts(self, request), requests)

    def models(self) -> list[str]:
        """The ids of the models that the server lists."""
        return [model.id for model in self._run(self._list_models())]

    async def _list_models(self) -> tuple[ListedModel, ...]:
        return (await self._reply(ModelList, self._client.models.with_raw_response.list)).data

    async def _list_models_if_possible(self) -> tuple[ListedModel, ...]:
        try:
            return await self._list_models()
        except (openai.APIStatusError, MalformedReply):
            return ()

    def _run(self, coroutine: Coroutine[Any, Any, Answer]) -> Answer:
        try:
            return asyncio.run_coroutine_threadsafe(coroutine, self._running_loop()).result()
        except Exception as error:
            raise self._as_align_error(error) from None

    async def chat(
        self,
        request: Request | ChoiceRequest,
        max_new_tokens: int,
        shape: type[ChatReply] = ChatReply,
        **options: Any,
    ) -> ChatReply:
        """The checked reply to a conversation, retried as the engine's settings say."""
        messages = as_dicts(with_system_prompt(request.messages, self.system_prompt))
        extra = {**self.block.extra, **options.pop("extra_body", {})}
        if request.prefill:
            messages.append({"role": "assistant", "content": request.prefill})
            # Understood by vLLM and SGLang; llama.cpp's own server continues a last assistant message by default.
            extra |= {"continue_final_message": True, "add_generation_prompt": False}
        # OpenAI's newer models refuse `max_tokens`; many other servers know only that name.
        options["max_completion_tokens" if self.block.base_url is None else "max_tokens"] = max_new_tokens
        create: Any = self._client.chat.completions.with_raw_response.create
        return await self._reply(
            shape, lambda: create(model=self.block.model, messages=messages, extra_body=extra, **options)
        )

    async def echo(self, prompt: str) -> TextReply:
        """The reply to a prompt that the server echoes with the log-probability of each token."""
        create: Any = self._client.completions.with_raw_response.create
        options = {"max_tokens": 1, "temperature": 0.0, "echo": True, "logprobs": 1}
        return await self._reply(TextReply, lambda: create(model=self.block.model, prompt=prompt, **options))

    def _as_align_error(self, error: Exception) -> AlignError:
        return error if isinstance(error, AlignError) else as_align_error(error, self.block, self._key)

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
        answer = answer_in_text(text)
        given = answer.given and not (reply.thought and not text)
        reason = reply.finish_reason if given else "length"
        return Completed(request.id, answer.text, reason, tokens, reply.thought + answer.thought, given)

    async def _reply(self, shape: type[Shape], send: Callable[[], Awaitable[Any]]) -> Shape:
        async def send_once() -> Shape:
            return read_reply(shape, (await send()).http_response.content)

        return await with_retries(send_once, retries=self.block.max_retries, timeout=self.block.timeout_seconds)

    def _scores(
        self, score: Callable[[ChoiceRequest], Awaitable[ChoiceScores]], requests: Sequence[ChoiceRequest]
    ) -> Iterator[ChoiceScores]:
        return self._answers(score, requests, refused_scores)

    def _answers(
        self,
        ask: Callable[[RequestT], Awaitable[AnswerT]],
        requests: Sequence[RequestT],
        refused: Callable[[RequestT, str], AnswerT],
    ) -> Iterator[AnswerT]:
        """The answers as they come.

        Args:
            refused: makes the answer to a prompt that the server refused, from the server's words.
        """

        async def answer(request: RequestT) -> AnswerT:
            try:
                return await ask(request)
            except openai.APIStatusError as error:
                if said := prompt_refusal(error, self._key):
                    return refused(request, said)
                raise

        return held_until_answered(self._results(answer, requests), self.block)

    def _results(self, ask: Callable[[RequestT], Awaitable[Answer]], requests: Sequence[RequestT]) -> Iterator[Answer]:
        results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        work = asyncio.run_coroutine_threadsafe(self._answer_all(ask, requests, results), self._running_loop())
        try:
            while (result := results.get()) is not _END:
                if isinstance(result, Exception):
                    raise self._as_align_error(result) from None
                yield result
        finally:
            work.cancel()

    async def _answer_all(
        self,
        ask: Callable[[RequestT], Awaitable[Answer]],
        requests: Sequence[RequestT],
        results: "queue.SimpleQueue[Any]",
    ) -> None:
        """Put each answer into the queue as it comes, and finally the first error or `_END`."""
        errors: list[Exception] = []

        async def answer_one(request: RequestT) -> None:
            async with self._slots:
                if errors:
                    return
                try:
                    results.put(await ask(request))
                except Exception as error:
                    errors.append(error)

        await asyncio.gather(*(answer_one(request) for request in requests))
        results.put(errors[0] if errors else _END)

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        """An event loop in a separate thread, so that replies are read and timed while the caller is busy."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name=self.name, daemon=True).start()
        return self._loop


_END = object()


def _description(listed: ListedModel) -> dict[str, str]:
    """A listed model's fields that identify it. Of a path on the server's disk only the last part is kept."""
    fields = listed.model_dump()
    return {key: value.rpartition("/")[2] if value.startswith("/") else value for key, value in fields.items() if value}


def _is_word(choice: str) -> bool:
    return len(choice.split()) == 1 and len(choice) <= MAX_WORD_LENGTH


def _share_of_concurrency(concurrency: int) -> int:
    """How many of the `concurrency` requests in flight belong to this process.

    Raises:
        InputError: there are more processes than requests allowed.
    """
    world_size, rank = processes.world_size(), processes.rank()
    if world_size > concurrency:
        raise InputError(
            f"engine.concurrency: {concurrency} concurrent requests cannot be divided among {world_size} processes; "
            "raise engine.concurrency, or start fewer processes"
        )
    return concurrency // world_size + (rank < concurrency % world_size)
