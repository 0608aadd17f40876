"""The replies of a server as checked data: what is missing or malformed is found before it is used."""

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from align.engines.server_faults import MalformedReply
from align.records import FinishReason

Logprob = Annotated[float, Field(le=0.01, allow_inf_nan=False)]
"""In nats. Rounding may put that of a certain token a little above 0."""

COMPLETE_REASONS = {"stop", "eos_token", "stop_sequence", "end_turn"}
"""Finish reasons of a complete text. After any other (a limit, a content filter) the text is truncated."""

SPACES = " \t\n\r\u0120\u2581"
"""White space around the word of a token, also as byte-level and SentencePiece vocabularies write it."""

INCOMPLETE_LOGPROBS = "no log-probability for some token after the first"

Shape = TypeVar("Shape", bound="Reply")


class _Usage(BaseModel):
    prompt_tokens: int = Field(ge=0)
    completion_tokens: int = Field(0, ge=0)


class Reply(BaseModel):
    """What all replies have in common. Unknown fields are ignored."""

    usage: _Usage | None = None


class _Message(BaseModel):
    """A message; the servers that separate a thought from its answer call it by one of two names."""

    content: str | None = None
    reasoning_content: Any = None
    reasoning: Any = None


class _Alternative(BaseModel):
    token: str
    logprob: Logprob


class _Token(_Alternative):
    top_logprobs: tuple[_Alternative, ...] = ()

    @field_validator("top_logprobs", mode="before")
    @classmethod
    def _none_is_empty(cls, given: Any) -> Any:
        return () if given is None else given


class _Tokens(BaseModel):
    content: tuple[_Token, ...] | None = None


class _ChatChoice(BaseModel):
    message: _Message
    finish_reason: str | None = None
    logprobs: _Tokens | None = None


class _PromptToken(BaseModel):
    logprob: Logprob


class ChatReply(Reply):
    """The reply to a chat request.

    `prompt_logprobs` is vLLM's extension: for each prompt token its log-probability and its alternatives', by token id,
    the prompt token first.
    """

    choices: Annotated[tuple[_ChatChoice, ...], Field(min_length=1)]
    prompt_logprobs: tuple[dict[str, _PromptToken] | None, ...] | None = None

    @field_validator("prompt_logprobs")
    @classmethod
    def _all_but_first(cls, given: tuple[dict[str, _PromptToken] | None, ...] | None) -> Any:
        if given and not all(given[1:]):
            raise ValueError(INCOMPLETE_LOGPROBS)
        return given

    @property
    def text(self) -> str:
        return self.choices[0].message.content or ""

    @property
    def thought(self) -> str:
        """The thought that the server separated; empty if there is none, or if it has another form than text."""
        message = self.choices[0].message
        return next((each for each in (message.reasoning_content, message.reasoning) if isinstance(each, str)), "")

    @property
    def finish_reason(self) -> FinishReason:
        return "stop" if self.choices[0].finish_reason in COMPLETE_REASONS else "length"

    @property
    def tokens(self) -> tuple[_Token, ...]:
        """The completion's tokens with their log-probabilities; empty where the server gave none."""
        logprobs = self.choices[0].logprobs
        return (logprobs.content or ()) if logprobs else ()

    @property
    def alternatives(self) -> list[tuple[str, float]]:
        """The alternatives for the first token as (word, log-probability)."""
        if not self.tokens:
            return []
        first = self.tokens[0]
        return [(each.token.strip(SPACES), each.logprob) for each in first.top_logprobs or (first,)]

    @property
    def prompt_token_logprobs(self) -> list[float] | None:
        """The log-probability of each prompt token (0 for the first); None where the server gave none."""
        if self.prompt_logprobs is None:
            return None
        return [next(iter(each.values())).logprob if each else 0.0 for each in self.prompt_logprobs]


class ScoredReply(ChatReply):
    """A chat reply that must have log-probabilities, from a server that has shown some before."""

    @model_validator(mode="after")
    def _is_scored(self) -> "ScoredReply":
        if not self.tokens:
            raise ValueError("no log-probabilities, though earlier replies had some")
        return self


class _TextLogprobs(BaseModel):
    tokens: tuple[str, ...]
    token_logprobs: tuple[Logprob | None, ...]

    @model_validator(mode="after")
    def _all_but_first(self) -> "_TextLogprobs":
        if len(self.tokens) != len(self.token_logprobs) or None in self.token_logprobs[1:]:
            raise ValueError(INCOMPLETE_LOGPROBS)
        return self


class _TextChoice(BaseModel):
    logprobs: _TextLogprobs | None = None


class TextReply(Reply):
    """The reply to a completion request that echoes its prompt."""

    choices: Annotated[tuple[_TextChoice, ...], Field(min_length=1)]


class ListedModel(BaseModel):
    """An entry in a server's list of models."""

    id: str
    root: str | None = None
    owned_by: str | None = None


class ModelList(Reply):
    """The reply to the request for the list of models."""

    data: tuple[ListedModel, ...]


def read_reply(shape: type[Shape], content: bytes) -> Shape:
    """The reply as checked data.

    Raises:
        MalformedReply: the content is not JSON, or not a reply of this shape.
    """
    try:
        return shape.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise MalformedReply(
            f"the reply does not follow the protocol ({f'{where}: ' if where else ''}{first['msg']})"
        ) from None
