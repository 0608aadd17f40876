"""Tries out what an engine can do, before a run of hours depends on it."""

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
PREFILL = "The capital of France is Par"


@dataclass(frozen=True)
class Finding:
    """A tested capability: whether the engine has it (None for a line without a verdict), and what was observed."""

    capability: str
    supported: bool | None
    observed: str


def check_engine(block: EngineBlock, model: ModelBlock) -> list[Finding]:
    """Test an engine.

    Raises:
        AlignError: the engine cannot be opened or reached, or fails to complete a request.
    """
    # The user is waiting, and should learn of an engine that needs many retries.
    engine = open_engine(block.model_copy(update={"max_retries": min(block.max_retries, 2)}), model)
    completions = _completions(engine)
    scores = [_tested("scores one-word choices", _words, engine), _tested("scores whole texts", _text, engine)]
    return [
        *([_tested("lists the model", _listed, engine)] if isinstance(engine, OpenAIEngine) else []),
        *completions,
        _tested("samples follow the seed", _seeds, engine),
        _tested("continues a prefilled answer", _prefill, engine),
        *scores,
        _tested("concurrent requests", _concurrency, engine, block.concurrency),
        Finding("kinds of judge", None, ", ".join(judge_kinds(*scores))),
    ]


def judge_kinds(words: Finding, text: Finding) -> list[str]:
    """The kinds of judge that the engine can serve; `rule` needs no engine."""
    supported = {"choice": words.supported, "contrast": text.supported, "rule": True}
    return [kind for kind in supported if supported[kind]]


def _tested(capability: str, test: "Callable[..., tuple[bool, str]]", *arguments: object) -> Finding:
    """The finding of a test. An error counts as lacking the capability."""
    try:
        return Finding(capability, *test(*arguments))
    except AlignError as error:
        return Finding(capability, False, str(error))


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
        Finding("ends its turn", short.finish_reason == "stop", f"finish reason {short.finish_reason}"),
        Finding("reports truncation", cut.finish_reason == "length", f"finish reason {cut.finish_reason} at 4 tokens"),
    ]


def _seeds(engine: Engine) -> tuple[bool, str]:
    first, again, other = (
        _completed(engine, name, LONG, 16, seed, 1.0).text for name, seed in (("1", 1), ("again", 1), ("2", 2))
    )
    greedy = {_completed(engine, name, LONG, 16).text for name in ("greedy", "again")}
    observed = "same seed: " + ("same text" if first == again else "different texts")
    observed += "; other seed: " + ("same text" if first == other else "different text")
    observed += "; greedy: " + ("same text" if len(greedy) == 1 else "different texts")
    return first == again != other, observed


def _prefill(engine: Engine) -> tuple[bool, str]:
    text = _completed(engine, "unfinished", SHORT, 8, prefill=PREFILL).text
    return text.startswith("is"), f"continues {PREFILL!r} with {text[:40]!r}"


def _words(engine: Engine) -> tuple[bool, str]:
    [scores] = engine.choice_logprobs([ChoiceRequest("letters", LETTERS_QUESTION, ("A", "B"))])
    count = engine.alternatives if isinstance(engine, OpenAIEngine) else 0
    method = f"by {engine.choice_method}" + (f", {count} alternatives" if count else "")
    if not any(map(math.isfinite, scores.logprobs)):
        # A judge would abstain from every comparison, and the run would end without a pair.
        return False, f"{method}: neither A nor B was among them, so a judge would abstain"
    values = ", ".join(f"{letter} {value:.2f}" for letter, value in zip("AB", scores.logprobs, strict=True))
    return True, f"{method}: {values} nats"


def _text(engine: Engine) -> tuple[bool, str]:
    text = "The capital of France is Paris."
    [scores] = engine.choice_logprobs([ChoiceRequest("text", SHORT, (text,))])
    return True, f"{scores.logprobs[0]:.2f} nats for the {scores.tokens[0]} tokens of {text!r}"


def _concurrency(engine: Engine, count: int) -> tuple[bool, str]:
    """The speed-up of `count` concurrent requests over the same requests one at a time."""
    single = []
    for number in range(3):
        start = time.monotonic()
        _completed(engine, f"alone {number}", LONG, 16, seed=number)
        single.append(time.monotonic() - start)
    requests = [Request(f"together {number}", LONG, number, 16, 0.0) for number in range(count)]
    start = time.monotonic()
    done = len(list(engine.complete(requests)))
    seconds = time.monotonic() - start
    one = statistics.median(single)
    speed_up = f"{count * one / seconds:.1f} times as fast as one after another"
    return done == count, f"one took {one:.2f} s, {count} together took {seconds:.2f} s: {speed_up}"


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
