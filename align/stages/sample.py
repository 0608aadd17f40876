"""sample: read the prompts, put each into its split, and complete those of the splits that the pipeline revises.

The model is the base model (or the recipe's engine): its completions are what revise criticises.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pydantic import Field

from align import processes
from align.config import Block, EngineBlock, ModelBlock, PromptsBlock, SamplingBlock
from align.data.prompts import read_prompts, split_problems, with_split
from align.generation import Completed, Request
from align.metrics import text_figures
from align.records import SPLITS, Prompt, Sample, Split, digest, write_rows
from align.repro import derive_seed
from align.stage import Context, Outcome, Stage
from align.tracking import METRICS


class SampleBlock(Block):
    """Completions to start from."""

    sampling: SamplingBlock = Field(default_factory=SamplingBlock)
    splits: tuple[Split, ...] = Field(("sft", "preference"), description="the splits whose prompts are completed")
    engine: EngineBlock = Field(default_factory=EngineBlock)


class SampleStage(Stage):
    """Reads the prompts and completes some of them with the base model."""

    name = "sample"
    help = "split the prompts, and complete them with the base model"
    settings = SampleBlock
    shares = ("model", "prompts")
    outputs = ("prompts.jsonl", "samples.jsonl", METRICS)

    def inputs(self, settings: SampleBlock) -> tuple[str, ...]:
        return ()

    def check(self, settings: SampleBlock, shared: Mapping[str, Any]) -> list[str]:
        return split_problems(shared["prompts"].split)

    def run(self, context: Context) -> Outcome:
        from align.backends.complete_all import complete_all
        from align.backends.open import open_backend

        settings: SampleBlock = context.settings
        block: PromptsBlock = context.shared["prompts"]
        model: ModelBlock = context.shared["model"]
        prompts = read_prompts(block)
        chosen = list(with_split(prompts, settings.splits))
        backend = open_backend(settings.engine, model)
        done = complete_all(
            backend,
            [_request(prompt, settings.sampling, context.seed) for prompt in chosen],
            settings.sampling.batch_size,
            context.output / "samples.journal",
            "sample",
        )
        samples = [_sample(prompt, done[prompt.id], backend.name, context.seed) for prompt in chosen]
        if processes.is_first():
            write_rows(context.output / "prompts.jsonl", prompts)
            write_rows(context.output / "samples.jsonl", samples)
        counts, figures = _counts(prompts, samples), _figures(samples, [done[prompt.id].tokens for prompt in chosen])
        context.log_rows([{**counts, **figures}])
        return Outcome(counts, {"categories": dict(Counter(prompt.category for prompt in prompts)), **figures})


def sample_seed(seed: int, prompt_id: str) -> int:
    """The seed of a prompt's sample."""
    return derive_seed(seed, "sample", prompt_id)


def _request(prompt: Prompt, sampling: SamplingBlock, seed: int) -> Request:
    return Request(
        id=prompt.id,
        messages=prompt.prompt,
        seed=sample_seed(seed, prompt.id),
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
    )


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
    )


def _counts(prompts: list[Prompt], samples: list[Sample]) -> dict[str, int]:
    splits = Counter(prompt.split for prompt in prompts)
    return {
        "prompts": len(prompts),
        **{f"prompts_{split}": splits[split] for split in SPLITS},
        "samples": len(samples),
        "samples_cut": sum(sample.finish_reason == "length" for sample in samples),
    }


def _figures(samples: list[Sample], tokens: list[int]) -> dict[str, float]:
    """What the completions look like: lengths, variety, repetition, how many ended by themselves."""
    if not samples:
        return {}
    completions, reasons = zip(*((sample.completion, sample.finish_reason) for sample in samples), strict=True)
    return asdict(text_figures(completions, tokens, reasons))


STAGE = SampleStage()
