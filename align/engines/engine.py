"""What an engine does: it completes conversations and gives the log-probabilities of continuations."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from align.records import Conversation, FinishReason


@dataclass(frozen=True)
class Request:
    """One completion to generate.

    `prefill` is text that opens the assistant's turn; the completion does not repeat it. All randomness comes from
    `seed`, so the same request in the same batch gives the same completion. `follow_up` takes this request's completion
    and returns the conversation's next request. An engine that still has the conversation in its cache may answer the
    follow-up in the same call; the caller submits it again if the engine did not. With `keep_token_ids`, an engine that
    has the completion's tokens returns them.
    """

    id: str
    messages: Conversation
    seed: int
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    prefill: str = ""
    follow_up: "Callable[[str], Request] | None" = None
    keep_token_ids: bool = False


@dataclass(frozen=True)
class Completed:
    """A completed request.

    Args:
        text: the answer (`align.data.answers`), without special tokens.
        finish_reason: 'length' where the limit cut the text, or where there is no answer.
        tokens: how many were generated, thought and stop token included.
        thought: what a thinking model wrote before its answer.
        answered: False if only a thought was written, or nothing.
        token_ids: the generated tokens, if the request asks for them and the engine has them.
        refused: why a server refused this prompt; empty if it did not. A refused request has no text.
    """

    id: str
    text: str
    finish_reason: FinishReason
    tokens: int
    thought: str = ""
    answered: bool = True
    token_ids: tuple[int, ...] = ()
    refused: str = ""


@dataclass(frozen=True)
class ChoiceRequest:
    """Alternative continuations of the assistant's turn to score. `prefill` precedes each choice."""

    id: str
    messages: Conversation
    choices: tuple[str, ...]
    prefill: str = ""


@dataclass(frozen=True)
class ChoiceScores:
    """For each choice, the sum of its tokens' log-probabilities in nats, and the number of those tokens.

    A server that shows only the most likely first tokens gives -inf to every choice if none of them is shown. A server
    that shows no log-probabilities is sampled instead, and the log-probabilities are estimated from those votes.
    `refused` says why a server refused the request; every choice then gets -inf.
    """

    id: str
    logprobs: tuple[float, ...]
    tokens: tuple[int, ...]
    refused: str = ""


@dataclass(frozen=True)
class EngineIdentity:
    """Which model answers.

    `digest` is the digest of the weights, computed on this machine; it is empty if the weights are not here. `said` is
    what a server reports about its model, which cannot be verified. Neither contains an address or a key.
    """

    kind: Literal["local", "server", "rule", "scripted", "recorded"]
    model: str
    digest: str = ""
    revision: str = ""
    precision: str = ""
    said: Mapping[str, str] = field(default_factory=dict)


Progress = Callable[[float], object]
"""Called by an engine that batches rows, with the share of the call's work in [0, 1] that is done."""


def no_progress(share: float) -> None:
    """A `Progress` that does nothing."""


class Engine(Protocol):
    """An engine. Results come in any order, as they finish."""

    name: str
    """Identifies the model and the engine in the rows that it makes; never contains a secret."""
    depends_on_batch: bool
    """Whether the last bits of a row depend on the other requests of the call."""

    @property
    def choice_method(self) -> str:
        """How one-word choices are scored, in words: by log-probabilities, or by a vote of samples."""

    def identity(self) -> EngineIdentity:
        """Which model answers. This call may hash the weights or query the server."""

    def complete(
        self, requests: Sequence[Request], progress: Progress = no_progress, at_once: int | None = None
    ) -> Iterator[Completed]:
        """Complete each request once. The engine may complete its follow-up too.

        An engine that keeps rows in memory works on at most `at_once` of them together; None leaves that to the engine.
        """

    def choice_logprobs(
        self, requests: Sequence[ChoiceRequest], progress: Progress = no_progress
    ) -> Iterator[ChoiceScores]:
        """Score each request's choices once.

        Raises:
            InputError: the engine cannot give log-probabilities; the message says what to use instead.
        """
