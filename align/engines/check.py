"""What an engine can do, found out by trying: for a person who sets one up, before a run of hours depends on it."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from align.engines.engine import ChoiceRequest, Completed, Engine, Request
from align.engines.open import open_engine
from align.engines.openai_server import OpenAIEngine
from align.engines.server_scores import LETTERS_QUESTION
from align.errors import AlignError
from align.records import Message
from align.settings.blocks import EngineBlock, ModelBlock

SHORT = (Message("user", "What is the capital of France? Answer with one word."),)
LONG = (Message("user", "Tell me a long story about a cat and a dog in a garden."),)
BEGUN = "The capital of France is Par"


@dataclass(frozen=True)
class Finding:
    """One thing that was tried: whether the engine can do it (None where that is no question), and what was seen."""

    what: str
    can: bool | None
    seen: str


def check_engine(block: EngineBlock, model: ModelBlock) -> list[Finding]:
    """Try an engine.

    Raises:
        AlignError: it cannot be opened or reached, or completes nothing.
    """
    # A person waits for the answer, and one that takes many tries is worth knowing of.
    engine = open_engine(block.model_copy(update={"max_retries": min(block.max_retries, 2)}), model)
    completions = _completions(engine)
    scores = [_tried("choices of a word", _letters, engine), _tried("log-probabilities of a text", _text, engine)]
    return [
        *([_tried("lists the model", _listed, engine)] if isinstance(engine, OpenAIEngine) else []),
        *completions,
        _tried("draws follow the seed", _seeds, engine),
        _tried("goes on with an unfinished answer", _unfinished, engine),
        *scores,
        _tried("requests together", _together, engine, block.concurrency),
        Finding("kinds of judge", None, ", ".join(judge_kinds(*scores))),
    ]


def judge_kinds(letters: Finding, text: Finding) -> list[str]:
    """The kinds of judge that the engine can serve; `rule` asks none."""
    return [kind for kind, can in (("choice", letters.can), ("contrast", text.can), ("rule", True)) if can]


def _tried(what: str, look: "Callable[..., tuple[bool, str]]", *given: object) -> Finding:
    """A finding, where a failure is one too."""
    try:
        return Finding(what, *look(*given))
    except AlignError as error:
        return Finding(what, False, str(error))


def _listed(engine: OpenAIEngine) -> tuple[bool, str]:
    names = engine.models()
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return engine.block.model in names, shown or "none"


def _completions(engine: Engine) -> list[Finding]:
    start = time.monotonic()
    short = _completed(engine, "short", SHORT, 64)
    seconds = time.monotonic() - start
    cut = _completed(engine, "cut", LONG, 4)
    text = short.text.strip()
    return [
        Finding("completes", bool(text), f"{text[:60]!r}, {short.tokens} tokens in {seconds:.2f} s"),
        Finding("ends its turn by itself", short.finish_reason == "stop", f"finish reason {short.finish_reason}"),
        Finding("says when it is cut", cut.finish_reason == "length", f"finish reason {cut.finish_reason} at 4 tokens"),
    ]


def _seeds(engine: Engine) -> tuple[bool, str]:
    first, again, other = (
        _completed(engine, name, LONG, 16, seed, 1.0).text for name, seed in (("1", 1), ("again", 1), ("2", 2))
    )
    greedy = {_completed(engine, name, LONG, 16).text for name in ("greedy", "again")}
    seen = "same seed, same text" if first == again else "same seed, other text"
    seen += "; other seed, " + ("same text" if first == other else "other text")
    seen += "; greedy, " + ("the same twice" if len(greedy) == 1 else "not the same twice")
    return first == again != other, seen


def _unfinished(engine: Engine) -> tuple[bool, str]:
    text = _completed(engine, "unfinished", SHORT, 8, prefill=BEGUN).text
    return text.startswith("is"), f"after {BEGUN!r} came {text[:40]!r}"


def _letters(engine: Engine) -> tuple[bool, str]:
    [scores] = engine.choice_logprobs([ChoiceRequest("letters", LETTERS_QUESTION, ("A", "B"))])
    count = engine.alternatives if isinstance(engine, OpenAIEngine) else 0
    shown = f", {count} alternatives" if count else ""
    if not any(map(math.isfinite, scores.logprobs)):
        # A judge would abstain from everything, and the run end without a pair.
        return False, f"by {engine.choice_method}{shown}: neither A nor B was among them, and a judge would abstain"
    values = ", ".join(f"{letter} {value:.2f}" for letter, value in zip("AB", scores.logprobs, strict=True))
    return True, f"by {engine.choice_method}{shown}: {values} nats"


def _text(engine: Engine) -> tuple[bool, str]:
    words = "The capital of France is Paris."
    [scores] = engine.choice_logprobs([ChoiceRequest("text", SHORT, (words,))])
    return True, f"{scores.logprobs[0]:.2f} nats for the {scores.tokens[0]} tokens of {words!r}"


def _together(engine: Engine, count: int) -> tuple[bool, str]:
    """One request after another, then `count` together: how much sooner they are done."""
    alone = []
    for number in range(3):
        start = time.monotonic()
        _completed(engine, f"alone {number}", LONG, 16, seed=number)
        alone.append(time.monotonic() - start)
    requests = [Request(f"together {number}", LONG, number, 16, 0.0) for number in range(count)]
    start = time.monotonic()
    done = len(list(engine.complete(requests)))
    seconds = time.monotonic() - start
    one = statistics.median(alone)
    return done == count, f"one took {one:.2f} s, {count} took {seconds:.2f} s ({count * one / seconds:.1f} at a time)"


def _completed(
    engine: Engine,
    name: str,
    messages: tuple[Message, ...],
    tokens: int,
    seed: int = 0,
    temperature: float = 0.0,
    prefill: str = "",
) -> Completed:
    [done] = engine.complete([Request(name, messages, seed, tokens, temperature, prefill=prefill)])
    return done
