"""Peak memory of sample, revise and compare at different numbers of prompts, with a function as the engine.

    python benchmarks/streaming.py --rows 1000 100000

Each number of prompts runs in a separate process. The setting: two rounds of critique and revision, two completions per
prompt, a rule judge, and texts of about 300 characters whose words are drawn with each request's seed.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CONSTITUTION = """\
title: Asking
principles:
  - {id: asks, text: End with a question., opposite: End with a statement., rule: {ends_with: "?"}}
"""
WORDS = [a + b + c for a in ("ka", "lo", "mi", "ne", "tu", "so") for b in ("ra", "ve", "di") for c in ("n", "l", "st")]
SPLIT = {"sft": 0.5, "preference": 0.5, "rl": 0, "eval": 0}


def text(request: Any) -> str:
    """Fifty words. A revision ends with a question nine times out of ten, anything else with a statement."""
    draw = random.Random(request.seed)
    sentences = [" ".join(draw.choices(WORDS, k=10)).capitalize() for _ in range(5)]
    asks = request.messages[-1].content.startswith("Rewrite") and draw.random() < 0.9
    return ". ".join(sentences) + ("?" if asks else ".")


def write_prompts(path: Path, rows: int) -> None:
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as out:
        for number in range(rows):
            out.write(json.dumps({"prompt": f"{number} " + " ".join(draw.choices(WORDS, k=12))}) + "\n")


def run_stages(folder: Path) -> Iterator[dict[str, Any]]:
    """Run the three stages in turn. A process's peak memory never falls, so a stage's peak covers those before it."""
    from scripted_engine import ScriptedEngine

    import align.engines.open
    from align.run.reproducibility import peak_resident_gb
    from align.run.stage import Context
    from align.settings.blocks import JudgeBlock, ModelBlock, TrackingBlock
    from align.settings.data import PromptsBlock
    from align.stages import compare, revise, sample

    align.engines.open.open_engine = lambda *_, **__: ScriptedEngine(text)  # type: ignore[assignment]
    (folder / "asking.yaml").write_text(CONSTITUTION)
    shared = {
        "model": ModelBlock(path="none"),
        "constitution": str(folder / "asking.yaml"),
        "judge": JudgeBlock(kind="rule"),
        "prompts": PromptsBlock.model_validate({"sources": [{"path": str(folder / "prompts.jsonl")}], "split": SPLIT}),
    }
    blocks = [
        (sample.STAGE, sample.SampleBlock()),
        (revise.STAGE, revise.ReviseBlock(rounds=2, splits=("sft", "preference"))),
        (compare.STAGE, compare.CompareBlock()),
    ]
    for stage, settings in blocks:
        start = time.monotonic()
        (folder / stage.name).mkdir()
        outcome = stage.run(
            Context(
                stage=stage.name,
                settings=settings,
                shared={name: shared[name] for name in stage.shares},
                inputs={name: folder / name for name in stage.inputs(settings)},
                output=folder / stage.name,
                seed=0,
                run_name="streaming",
                tracking=TrackingBlock(),
            )
        )
        yield {
            "stage": stage.name,
            "rows": next(iter(outcome.counts.values())),
            "seconds": round(time.monotonic() - start, 1),
            "peak_mb": round(1000 * peak_resident_gb()),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 100_000], help="numbers of prompts")
    parser.add_argument("--folder", type=Path, help="run the first number of --rows in this process, in this folder")
    given = parser.parse_args()
    if given.folder:
        given.folder.mkdir(parents=True, exist_ok=True)
        write_prompts(given.folder / "prompts.jsonl", given.rows[0])
        for figures in run_stages(given.folder):
            print(json.dumps(figures), flush=True)
        return
    for rows in given.rows:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, __file__, "--rows", str(rows), "--folder", folder], check=True)


if __name__ == "__main__":
    main()
