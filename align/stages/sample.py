"""sample: read the prompts, assign each to a split, and complete those of the splits that later stages need.

The base model, or the recipe's engine, writes the completions, which revise then criticises. Prompts and samples are
streamed, a window at a time.
"""

import heapq
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field

from align.data.prompts import split_problems, stream_prompts, with_split
from align.engines.engine import Completed, Request
from align.engines.provenance import PROVENANCE, text_provenance, write_provenance
from align.errors import InputError
from align.figures.text_metrics import text_figures
from align.records import SPLITS, Conversation, Prompt, Row, Sample, Split, digest, read_rows
from align.run import processes
from align.run.reproducibility import derive_seed
from align.run.stage import Context, Outcome, Stage
from align.run.streaming import DEFAULT_WINDOW, WINDOW_HELP, RowFile, Window, windows
from align.run.tracking import METRICS
from align.settings.blocks import Block, EngineBlock, ModelBlock, Positive, PromptsBlock, SamplingBlock

if TYPE_CHECKING:
    from align.engines.engine import Engine

DESCRIBED = 1024
"""The number of samples that the figures describe, chosen by a hash. Measures of variety need all texts in memory."""

REFUSED = "refused.jsonl"
"""The prompts that the engine's server refused, each with the reason. They get no sample."""


class SampleBlock(Block):
    """The completions that the pipeline starts from."""

    sampling: SamplingBlock = Field(default_factory=SamplingBlock)
    splits: tuple[Split, ...] = Field(("sft", "preference"), description="the splits whose prompts are completed")
    engine: EngineBlock = Field(default_factory=EngineBlock)
    window: Positive = Field(DEFAULT_WINDOW, description=WINDOW_HELP)


class SampleStage(Stage):
    name = "sample"
    help = "split the prompts, and complete them with the base model"
    settings = SampleBlock
    shares = ("model", "prompts")
    outputs = ("prompts.jsonl", "samples.jsonl", REFUSED, PROVENANCE, METRICS)

    def inputs(self, settings: SampleBlock) -> tuple[str, ...]:
        return ()

    def check(self, settings: SampleBlock, shared: Mapping[str, Any]) -> list[str]:
        return split_problems(shared["prompts"].split)

    def run(self, context: Context) -> Outcome:
        from align.engines.open import open_engine

        settings: SampleBlock = context.settings
        model: ModelBlock = context.shared["model"]
        counts: Counter[str] = Counter()
        categories: Counter[str] = Counter()
        if processes.is_first():
            _write_prompts(context, counts, categories)
            _warn_of_empty_splits(settings.splits, counts)
        processes.barrier()
        engine = open_engine(settings.engine, model)
        provenance = text_provenance(context, "completion", engine, settings.engine)
        write_provenance(context.output, [provenance])
        made = _samples(context, engine, provenance.id, counts)
        described = heapq.nsmallest(DESCRIBED, made, key=lambda each: each.sample.id)

        repeated = ("prompts_repeated",) if counts["prompts_repeated"] else ()
        rare = [name for name in ("samples_without_answer", "samples_refused") if counts[name]]
        names = ("prompts", *map(_of_split, SPLITS), *repeated, "samples", "samples_cut", *rare)
        ordered = {name: counts[name] for name in names}
        figures = _figures(described)
        context.log_rows([{**ordered, **figures}])
        return Outcome(ordered, {"categories": dict(categories), **figures})


@dataclass(frozen=True)
class RefusedPrompt(Row):
    """A prompt that the engine's server refused, and why. `source` is the prompt's file."""

    id: str
    prompt: Conversation
    source: str
    reason: str


class _Made(NamedTuple):
    """A sample and its number of tokens."""

    sample: Sample
    tokens: int


def _write_prompts(context: Context, counts: Counter[str], categories: Counter[str]) -> None:
    block: PromptsBlock = context.shared["prompts"]
    path = context.output / "prompts.jsonl"
    try:
        with RowFile(path) as out:
            for prompt in stream_prompts(block, counts):
                out.add(prompt)
                counts.update(("prompts", _of_split(prompt.split)))
                categories[prompt.category] += 1
    except InputError:
        path.unlink()
        raise


def _warn_of_empty_splits(splits: Sequence[Split], counts: Mapping[str, int]) -> None:
    """Warn if there is nothing to complete because all prompts fell into other splits."""
    if not splits or any(counts[_of_split(split)] for split in splits):
        return
    others = ", ".join(f"{count} in {split}" for split in SPLITS if (count := counts[_of_split(split)]))
    print(
        f"sample: no prompt is completed: none fell into {' or '.join(splits)} ({others or 'there are none'}); change "
        "`prompts.split` or `sample.splits`, or add prompts",
        file=sys.stderr,
        flush=True,
    )


def _of_split(split: str) -> str:
    return f"prompts_{split}"


def _samples(context: Context, engine: "Engine", provenance: str, counts: Counter[str]) -> Iterator[_Made]:
    """Write every sample, in the order of the prompts, and yield it."""
    settings: SampleBlock = context.settings
    total = sum(1 for _ in _chosen(context))
    with RowFile(context.output / "samples.jsonl") as out, RowFile(context.output / REFUSED) as refused:
        for window in windows(_chosen(context), total, settings.window, context.output):
            done = _complete(window, settings.sampling, engine, context.seed)
            for prompt in window.rows:
                completed = done[prompt.id]
                if completed.refused:
                    refused.add(RefusedPrompt(prompt.id, prompt.prompt, prompt.source, completed.refused))
                    counts["samples_refused"] += 1
                    continue
                sample = replace(_sample(prompt, completed, engine.name, context.seed), provenance=provenance)
                out.add(sample)
                counts["samples"] += 1
                counts["samples_cut"] += sample.finish_reason == "length"
                if not completed.answered:
                    counts["samples_without_answer"] += 1
                yield _Made(sample, completed.tokens)


def _chosen(context: Context) -> Iterator[Prompt]:
    """The prompts of the splits that are completed."""
    return with_split(read_rows(context.output / "prompts.jsonl", Prompt), context.settings.splits)


def _complete(window: Window[Prompt], sampling: SamplingBlock, engine: "Engine", seed: int) -> dict[str, Completed]:
    from align.engines.complete_all import complete_all

    how = (sampling.max_new_tokens, sampling.temperature, sampling.top_p)
    requests = [Request(each.id, each.prompt, sample_seed(seed, each.id), *how) for each in window.rows]
    journal = window.folder / "samples.journal"
    return complete_all(engine, requests, sampling.batch_size, journal, f"sample{window.label}")


def sample_seed(seed: int, prompt_id: str) -> int:
    """The seed of a prompt's sample."""
    return derive_seed(seed, "sample", prompt_id)


def _sample(prompt: Prompt, completed: Completed, engine: str, seed: int) -> Sample:
    return Sample(
        id=digest([prompt.id, "sample"]),
        prompt_id=prompt.id,
        prompt=prompt.prompt,
        completion=completed.text.strip(),
        finish_reason=completed.finish_reason,
        split=prompt.split,
        category=prompt.category,
        engine=engine,
        seed=sample_seed(seed, prompt.id),
        thought=completed.thought,
    )


def _figures(made: Sequence[_Made]) -> dict[str, float]:
    """Figures of the completions: lengths, variety, repetition, and the share that ended with a stop token."""
    if not made:
        return {}
    completions = [each.sample.completion for each in made]
    reasons = [each.sample.finish_reason for each in made]
    return asdict(text_figures(completions, [each.tokens for each in made], reasons))


STAGE = SampleStage()
