"""What a server's replies must hold, checked before anything is made of them."""

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from align.engines.server_faults import MalformedReply
from align.records import FinishReason

Logprob = Annotated[float, Field(le=0.01, allow_inf_nan=False)]
"""In nats; rounding takes a certain token's a little above 0."""

ENDED = {"stop", "eos_token", "stop_sequence", "end_turn"}
"""Finish reasons of a whole text. Any other (a limit, a content filter) left one that is not whole."""

SPACES = " \t\n\r\u0120\u2581"
"""What tokens may have around their word: spaces, also as byte-level and SentencePiece vocabularies write them."""

Shape = TypeVar("Shape", bound="Reply")


class _Usage(BaseModel):
    prompt_tokens: int = Field(ge=0)
    completion_tokens: int = Field(0, ge=0)


class Reply(BaseModel):
    """What every reply has. Fields that nobody here reads are left alone."""

    usage: _Usage | None = None


class _Message(BaseModel):
    content: str | None = None


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


class _GivenToken(BaseModel):
    logprob: Logprob


class ChatReply(Reply):
    """The reply to a chat request. `prompt_logprobs` is vLLM's: a token's alternatives by id, its own first."""

    choices: Annotated[tuple[_ChatChoice, ...], Field(min_length=1)]
    prompt_logprobs: tuple[dict[str, _GivenToken] | None, ...] | None = None

    @field_validator("prompt_logprobs")
    @classmethod
    def _each_has_one(cls, given: tuple[dict[str, _GivenToken] | None, ...] | None) -> Any:
        if given and not all(given[1:]):
            raise ValueError("not a log-probability for each token but the first")
        return given

    @property
    def text(self) -> str:
        return self.choices[0].message.content or ""

    @property
    def finish_reason(self) -> FinishReason:
        return "stop" if self.choices[0].finish_reason in ENDED else "length"

    @property
    def tokens(self) -> tuple[_Token, ...]:
        """The tokens with their log-probabilities; none where the server gave none."""
        shown = self.choices[0].logprobs
        return (shown.content or ()) if shown else ()

    @property
    def alternatives(self) -> list[tuple[str, float]]:
        """The words that the first token might have been, with their log-probabilities."""
        if not self.tokens:
            return []
        first = self.tokens[0]
        return [(each.token.strip(SPACES), each.logprob) for each in first.top_logprobs or (first,)]

    @property
    def given_logprobs(self) -> list[float] | None:
        """The log-probability of each token of the prompt (0 for the first); None where the server gave none."""
        if self.prompt_logprobs is None:
            return None
        return [next(iter(each.values())).logprob if each else 0.0 for each in self.prompt_logprobs]


class ScoredReply(ChatReply):
    """The reply of a server that shows log-probabilities: one without them is a faulty one."""

    @model_validator(mode="after")
    def _is_scored(self) -> "ScoredReply":
        if not self.tokens:
            raise ValueError("no log-probabilities, though it had given some before")
        return self


class _TextLogprobs(BaseModel):
    tokens: tuple[str, ...]
    token_logprobs: tuple[Logprob | None, ...]

    @model_validator(mode="after")
    def _each_has_one(self) -> "_TextLogprobs":
        if len(self.tokens) != len(self.token_logprobs) or None in self.token_logprobs[1:]:
            raise ValueError("not a log-probability for each token but the first")
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
    """The reply to the question which models there are."""

    data: tuple[ListedModel, ...]


def read_reply(shape: type[Shape], content: bytes) -> Shape:
    """The reply as checked data.

    Raises:
        MalformedReply: it is no JSON, or lacks what such a reply must hold.
    """
    try:
        return shape.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise MalformedReply(
            f"gave a reply that is not of the protocol ({f'{where}: ' if where else ''}{first['msg']})"
        ) from None
