"""Hand-made upstream folders and contexts for the tests of the training stages."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.feedback.records import Revision
from align.records import FinishReason, Message, PreferencePair, Prompt, Row, Sample, Split, digest, write_rows
from align.run.stage import Context, Outcome, Stage
from align.settings.blocks import ModelBlock, TrackingBlock

SMALL_LORA = {"r": 4, "alpha": 8}
GOOD, BAD = "Yes, the cat sat on the mat!", "no"


def prompt(number: int) -> tuple[Message, ...]:
    return (Message("user", f"Where is cat number {number}?"),)


def asked(number: int, category: str = "benign", source: str = "benign.jsonl") -> Prompt:
    return Prompt(f"prompt-{number}", prompt(number), "sft", category, source)


def sample(number: int, finish_reason: FinishReason = "stop", split: Split = "sft", category: str = "benign") -> Sample:
    return Sample(
        id=f"sample-{number}",
        prompt_id=f"prompt-{number}",
        prompt=prompt(number),
        completion=f"On mat {number}.",
        finish_reason=finish_reason,
        split=split,
        category=category,
    )


def revision(number: int, accepted: bool = True, split: Split = "sft", completion: str = GOOD) -> Revision:
    return Revision(
        id=f"revision-{number}",
        prompt_id=f"prompt-{number}",
        prompt=prompt(number),
        original=f"On mat {number}.",
        completion=completion,
        principle_ids=("exclaim",),
        p_better=0.9,
        accepted=accepted,
        reason="" if accepted else "judged worse",
        split=split,
        category="odd",
    )


def pair(number: int, probability: float = 1.0, chosen: str = GOOD, rejected: str = BAD) -> PreferencePair:
    return PreferencePair(
        id=digest([number, chosen, rejected]),
        prompt=prompt(number),
        chosen=(Message("assistant", chosen),),
        rejected=(Message("assistant", rejected),),
        probability=probability,
        source="ai",
    )


def upstream(run: Path, stage: str, **files: list[Any]) -> Path:
    """A published stage's folder with the given JSONL files of records."""
    folder = run / stage
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        write_rows(folder / f"{name}.jsonl", (row for row in rows if isinstance(row, Row)))
    return folder


def context(
    stage: Stage,
    settings: Mapping[str, Any],
    model: Path,
    output: Path,
    inputs: Mapping[str, Path] | None = None,
    *,
    lora: Mapping[str, Any] | None = None,
    precision: str = "fp32",
    seed: int = 7,
) -> Context:
    output.mkdir(parents=True, exist_ok=True)
    block = ModelBlock.model_validate({"path": str(model), "precision": precision, "lora": lora})
    return Context(
        stage=stage.name,
        settings=stage.settings.model_validate(settings),
        shared={"model": block},
        inputs=inputs or {},
        output=output,
        seed=seed,
        run_name="test",
        tracking=TrackingBlock(),
    )


def run(stage: Stage, *args: Any, **options: Any) -> Outcome:
    return stage.run(context(stage, *args, **options))


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def same(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    import torch

    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
