"""A run's files that were truncated or overwritten are named, with what to remove."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from align.errors import InputError
from align.evaluation.policies import measure_all
from align.evaluation.report import EvaluatedSample
from align.records import Message, Sample, read_rows
from align.rl import checkpoint
from align.run.artefacts import Journal, Manifest, read_manifest, write_json
from align.run.damaged_files import check_files
from align.run.tracking import truncate_rows

GARBAGE = b"\x00\xff{garbage"
Damage = Callable[[Path], object]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def overwrite(path: Path) -> None:
    path.write_bytes(GARBAGE * 9)


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES = pytest.mark.parametrize("damage", [cut, overwrite, empty])


@DAMAGES
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"])
def test_a_checkpoint_is_checked_before_anything_resumes_from_it(tmp_path: Path, name: str, damage: Damage) -> None:
    save_file({"a": torch.ones(5), "b": torch.ones(3)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for other in ("optimizer.pt", "rng_state.pth"):
        torch.save({"a": torch.ones(3)}, tmp_path / other)
    (tmp_path / "trainer_state.json").write_text('{"global_step": 3}\n')
    check_files(tmp_path)
    damage(tmp_path / name)
    with pytest.raises(InputError, match=rf"{name}: damaged \(.+\); remove {tmp_path} and run again"):
        check_files(tmp_path)


@DAMAGES
def test_a_damaged_checkpoint_of_ppo_is_named_and_without_it_the_one_before_is_used(
    tmp_path: Path, damage: Damage
) -> None:
    for iteration in (1, 2):
        checkpoint.save(
            tmp_path, iteration, {"kl": 1.0}, lambda folder: torch.save({}, folder / "state.pt"), lambda saved: saved
        )
    [_, newest] = sorted((tmp_path / "checkpoint").iterdir())
    damage(newest / "state.pt")
    with pytest.raises(InputError, match=rf"state.pt: damaged .*; remove {newest} and run again"):
        checkpoint.newest(tmp_path)
    shutil.rmtree(newest)
    found = checkpoint.newest(tmp_path)
    assert found is not None and found[1]["iteration"] == 1


@DAMAGES
def test_a_damaged_manifest_is_named(tmp_path: Path, damage: Damage) -> None:
    write_json(tmp_path / "manifest.json", Manifest("sft", "0", {}, {}, {}).__dict__)
    assert read_manifest(tmp_path) is not None
    damage(tmp_path / "manifest.json")
    remedy = f"remove {tmp_path} and run the stage again"
    with pytest.raises(InputError, match=f"manifest.json: not a manifest .*; {remedy}"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "line", [GARBAGE, b"{}", b"[]", b"3", b'{"id": 3}', b'{"id": "b", "text": "', b'{"id": ["b"]}'], ids=repr
)
def test_a_journals_damaged_line_is_named_and_nothing_is_lost(tmp_path: Path, line: bytes) -> None:
    own = tmp_path / "rows.journal.0"
    content = b'{"id": "a"}\n' + line + b'\n{"id": "c"}\n'
    own.write_bytes(content)
    with pytest.raises(InputError, match=r"rows\.journal\.0, line 2: damaged \(.+\); remove the line, or the file"):
        Journal(tmp_path / "rows.journal")
    assert own.read_bytes() == content


@pytest.mark.parametrize("value", ["NaN", "Infinity", "[0.5, NaN]"])
def test_a_stored_score_that_is_not_finite_is_refused(tmp_path: Path, value: str) -> None:
    sample = EvaluatedSample("sft/p", "p", (Message("user", "Why?"),), "", "sft", "So.", "stop", 2)
    (tmp_path / "scores.journal.0").write_text(f'{{"id": "sft/p", "value": {value}}}\n')
    with pytest.raises(InputError, match=r"scores\.journal\.0, line 1: damaged \(a number in it is not finite\)"):
        measure_all([sample], lambda: pytest.fail("measured"), 4, tmp_path / "scores.journal", "scores")


@pytest.mark.parametrize("line", [GARBAGE, b"{}", b"[]", b'{"step": "x"}'])
def test_a_damaged_row_of_figures_is_named_and_the_file_is_left(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b"\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 2: damaged \(.+\); remove the line and run again"):
        truncate_rows(path, "step", 5)
    assert path.read_bytes() == b'{"step": 1}\n' + line + b"\n"


@pytest.mark.parametrize("row", [{}, {"id": "a", "colour": "red"}])
def test_a_published_row_that_is_no_record_is_named(tmp_path: Path, row: dict[str, str]) -> None:
    path = tmp_path / "sample" / "samples.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match=rf"samples\.jsonl, row 1: damaged, .*; remove {path.parent} and run again"):
        list(read_rows(path, Sample))
