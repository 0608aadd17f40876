"""Stages that stream in windows: the same bytes for every window size, and no more memory for more prompts."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from align.run.artefacts import Manifest, write_json
from align.stages.compare import STAGE as COMPARE
from align.stages.compare import CompareBlock
from align.stages.revise import STAGE as REVISE
from align.stages.revise import ReviseBlock
from align.stages.sample import STAGE as SAMPLE
from align.stages.sample import SampleBlock
from tests.stages.test_sample_revise_compare import World, dying, outputs, reply, scripted, varied

STAGES = [
    (SAMPLE, SampleBlock, {}),
    (REVISE, ReviseBlock, {"rounds": 2, "splits": ["sft", "preference"]}),
    (COMPARE, CompareBlock, {"completions": 3, "revision_pairs": True}),
]


@pytest.fixture
def world(tmp_path: Path, tiny_prompts: Path) -> World:
    from tests.stages.test_sample_revise_compare import ASKING

    (tmp_path / "asking.yaml").write_text(ASKING)
    return World(tmp_path, tiny_prompts)


def answer(request: Any) -> str:
    return reply(request) + varied(request)


def settings(block: Any, options: dict[str, Any], window: int) -> Any:
    return block.model_validate({"sampling": {"batch_size": 3}, **options, "window": window})


@pytest.mark.parametrize("window", [1, 7])
def test_the_window_changes_no_byte(world: World, monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    scripted(monkeypatch, answer)
    for stage, block, options in STAGES:
        whole = world.run(stage, settings(block, options, 1000))
        cut = world.run(stage, settings(block, options, window), output="cut")

        assert outputs(world.root / "cut", stage) == outputs(world.root / stage.name, stage)
        assert (cut.counts, cut.figures) == (whole.counts, whole.figures)
        shutil.rmtree(world.root / "cut")
        # Of a stage with a manifest compare keeps the judged revisions.
        settled = {"settings": settings(block, options, 1000).model_dump(mode="json")}
        write_json(world.root / stage.name / "manifest.json", Manifest(stage.name, "", settled, {}, {}).__dict__)
    assert (world.root / "compare/judged_revisions.jsonl").read_text()


@pytest.mark.parametrize("death", [3, 10, 23])
def test_a_stage_killed_between_or_in_windows_asks_for_nothing_twice(
    world: World, monkeypatch: pytest.MonkeyPatch, death: int
) -> None:
    for stage, block, options in STAGES:
        asked: list[str] = []

        def counted(request: Any, asked: list[str] = asked) -> str:
            asked.append(request.id)
            return answer(request)

        chosen = settings(block, options, 4)
        scripted(monkeypatch, dying(counted, death))
        try:
            world.run(stage, chosen)
        except KeyboardInterrupt:
            pass
        else:
            assert len(asked) <= death
        scripted(monkeypatch, counted)
        world.run(stage, chosen)

        assert len(asked) == len(set(asked))


def peak(rows: int, folder: Path) -> float:
    """Peak memory, in MB, of sample, revise and compare with a function as the engine, in a separate process."""
    command = [sys.executable, "benchmarks/streaming.py", "--rows", str(rows), "--folder", str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2], timeout=240
    )
    figures = [json.loads(line) for line in done.stdout.splitlines() if re.match(r"{", line)]
    return max(float(each["peak_mb"]) for each in figures)


def test_memory_does_not_grow_with_the_prompts(tmp_path: Path) -> None:
    few, many = peak(500, tmp_path / "few"), peak(5000, tmp_path / "many")

    # With all rows held at once 4,500 more prompts take over 100 MB.
    assert many < 1.1 * few + 10
