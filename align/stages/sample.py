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

from align.data.prompts import CUT, ODD_SPLIT, Fit, split_problems, stream_prompts, with_split
from align.data.sources import LEFT_OUT, Intake, open_intake
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
from align.settings.blocks import Block, EngineBlock, ModelBlock, Positive, SamplingBlock
from align.settings.data import PromptsBlock

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
    outputs = ("prompts.jsonl", "samples.jsonl", REFUSED, LEFT_OUT, PROVENANCE, METRICS)

    def inputs(self, settings: SampleBlock) -> tuple[str, ...]:
        return ()

    def check(self, settings: SampleBlock, shared: Mapping[str, Any]) -> list[str]:
        prompts: PromptsBlock = shared["prompts"]
        faults = split_problems(prompts.split)
        if prompts.cut and prompts.max_tokens is None and settings.engine.kind == "openai":
            faults.append("prompts.cut: a server does not say how much it can read; set `prompts.max_tokens` too")
        return faults

    def run(self, context: Context) -> Outcome:
        from align.engines.open import open_engine

        settings: SampleBlock = context.settings
        model: ModelBlock = context.shared["model"]
        counts: Counter[str] = Counter()
        categories: Counter[str] = Counter()
        # A recipe may read the prompts alone, and then needs no model here.
        engine = open_engine(settings.engine, model) if settings.splits else None
        if processes.is_first():
            _write_prompts(context, prompt_fit(context, engine), counts, categories)
            _warn_of_empty_splits(settings.splits, counts)
        processes.barrier()
        if engine is None:
            return _prompts_alone(context, counts, categories)
        provenance = text_provenance(context, "completion", engine, settings.engine)
        write_provenance(context.output, [provenance])
        made = _samples(context, engine, provenance.id, counts)
        described = heapq.nsmallest(DESCRIBED, made, key=lambda each: each.sample.id)

        always = ("prompts", *map(_of_split, SPLITS), "samples", "samples_cut")
        others = sorted(name for name, count in counts.items() if count and name not in always)
        ordered = {name: counts[name] for name in (*always[:5], *others, *always[5:])}
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


def _prompts_alone(context: Context, counts: Counter[str], categories: Counter[str]) -> Outcome:
    """The outcome where no prompt is completed, for recipes in which only the prompts are read. Loads no model."""
    write_provenance(context.output, [])
    if processes.is_first():
        with RowFile(context.output / "samples.jsonl"):
            pass
    ordered = {name: counts[name] for name in ("prompts", *map(_of_split, SPLITS), "samples")}
    context.log_rows([ordered])
    return Outcome(ordered, {"categories": dict(categories)})


class _Made(NamedTuple):
    """A sample and its number of tokens."""

    sample: Sample
    tokens: int


def prompt_fit(context: Context, engine: "Engine | None") -> Fit | None:
    """What becomes of prompts that the recipe's model cannot read.

    None for a server without `prompts.max_tokens`: it refuses what it cannot read itself.
    """
    from align.data.prompt_fit import PromptFit
    from align.engines.local import LocalEngine
    from align.models.loading import load_tokenizer

    block: PromptsBlock = context.shared["prompts"]
    model: ModelBlock = context.shared["model"]
    if isinstance(engine, LocalEngine):
        room = engine.positions and engine.positions - context.settings.sampling.max_new_tokens
        return PromptFit(engine.tokenizer, model.system_prompt, block.max_tokens or room, block.cut)
    if block.max_tokens is None:
        return None
    tokenizer = load_tokenizer(model.path, revision=model.revision, trust_remote_code=model.trust_remote_code)
    return PromptFit(tokenizer, model.system_prompt, block.max_tokens, block.cut)


def _write_prompts(context: Context, fit: Fit | None, counts: Counter[str], categories: Counter[str]) -> None:
    block: PromptsBlock = context.shared["prompts"]
    path = context.output / "prompts.jsonl"
    try:
        with RowFile(path) as out, open_intake(context.output, counts) as intake:
            for prompt in stream_prompts(block, intake, fit):
                out.add(prompt)
                counts.update(("prompts", _of_split(prompt.split)))
                categories[prompt.category] += 1
        _tell_prompts(intake)
    except InputError:
        path.unlink()
        raise


def _tell_prompts(intake: Intake) -> None:
    """Say before anything is generated what was left out or cut.

    Raises:
        InputError: no prompt is left.
    """
    counts = intake.counts
    told = {**intake.left_out, **{name: counts[name] for name in (CUT, ODD_SPLIT) if counts[name]}}
    listed = ", ".join(f"{count} {name}" for name, count in sorted(told.items()))
    if not counts["prompts"]:
        raise InputError(
            f"sample: no prompt is left ({listed or 'none was read'}); raise `prompts.max_tokens`, set `prompts.cut` "
            "or give other prompts"
        )
    if told:
        kept = f" ({LEFT_OUT} will have the rows left out)" if intake.left_out else ""
        print(f"sample: {counts['prompts']} prompts; {listed}{kept}", flush=True)


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
