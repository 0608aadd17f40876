"""What an engine does: complete conversations, and give the log-probability of continuations."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from align.records import Conversation, FinishReason


@dataclass(frozen=True)
class Request:
    """One completion to make. `prefill` is text put at the start of the assistant's turn and not returned.

    The same request in the same batch gives the same completion: its randomness comes from `seed` alone. `follow_up`
    makes the conversation's next request from the text of this one; an engine may answer it in the same call, where it
    still has the conversation at hand, and whoever asks puts it again where the engine did not.
    """

    id: str
    messages: Conversation
    seed: int
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    prefill: str = ""
    follow_up: "Callable[[str], Request] | None" = None


@dataclass(frozen=True)
class Completed:
    """A finished request: the text without special tokens, why it ended, how many tokens it took (stop included)."""

    id: str
    text: str
    finish_reason: FinishReason
    tokens: int


@dataclass(frozen=True)
class ChoiceRequest:
    """Continuations of the assistant's turn to score. `prefill` comes before each choice."""

    id: str
    messages: Conversation
    choices: tuple[str, ...]
    prefill: str = ""


@dataclass(frozen=True)
class ChoiceScores:
    """For each choice, the sum of its tokens' log-probabilities in nats, and how many tokens that was.

    A server that shows only the first token's alternatives gives -inf for a choice that is not among them; one that
    shows none is asked for samples, and the log-probabilities are those of the votes.
    """

    id: str
    logprobs: tuple[float, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class EngineIdentity:
    """Which model answers.

    `digest` is that of the weights, read here; empty where there are none to read. `said` is what a server says of its
    model, which nobody can check from outside. Neither holds an address or a key.
    """

    kind: Literal["local", "server", "rule", "scripted", "recorded"]
    model: str
    digest: str = ""
    revision: str = ""
    precision: str = ""
    said: Mapping[str, str] = field(default_factory=dict)


Progress = Callable[[float], object]
"""Told now and then, by an engine that works on many rows at once, what share in [0, 1] of a call's work is done."""


def unheard(share: float) -> None:
    """Progress that nobody follows."""


class Engine(Protocol):
    """An engine. Results come in any order, as they finish."""

    name: str
    """Names model and engine in the rows it makes; never holds a secret."""
    depends_on_batch: bool
    """Whether the last bits of a row depend on which rows were asked for with it."""

    @property
    def choice_method(self) -> str:
        """How choices of one word are scored, in words: by log-probabilities, or by a vote of samples."""

    def identity(self) -> EngineIdentity:
        """Which model answers; weights are read, or a server asked, when this is called."""

    def complete(
        self, requests: Sequence[Request], progress: Progress = unheard, at_once: int | None = None
    ) -> Iterator[Completed]:
        """Complete each request once, and perhaps its follow-up.

        An engine that holds rows in memory has at most `at_once` of them under way; None leaves that to the engine.
        """

    def choice_logprobs(
        self, requests: Sequence[ChoiceRequest], progress: Progress = unheard
    ) -> Iterator[ChoiceScores]:
        """Score each request's choices once.

        Raises:
            InputError: the engine cannot give log-probabilities; the text says what to use instead.
        """
