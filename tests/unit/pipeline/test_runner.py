"""How a stage is run and published, with stages that only write files."""

import errno
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from align.errors import InputError, NotFinite
from align.pipeline.plan import make_plan
from align.pipeline.recipe import Recipe, load_recipe, recipe_model
from align.pipeline.runner import DATE, run_date, run_stage
from align.run.artefacts import PARTIAL, read_manifest
from align.run.disk_faults import explained_disk_faults
from align.stages import all_stages
from tests.fakes import add_fake_stages, remove_fake_stages

RUN = Path("runs/recipe/shared")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    add_fake_stages()
    recipe_model.cache_clear()
    Path("recipe.yaml").write_text("letters: {}\ncapitals: {}\n")
    yield tmp_path
    remove_fake_stages()
    recipe_model.cache_clear()


def recipe(*overrides: str) -> Recipe:
    return load_recipe("recipe.yaml", overrides)


def test_a_stage_is_published_with_its_outputs_and_a_manifest() -> None:
    assert run_stage(recipe(), "letters")
    assert (RUN / "letters/letters.txt").read_text() == "abc"
    manifest = read_manifest(RUN / "letters")
    assert manifest is not None
    assert sorted(manifest.outputs) == ["folder/inner/file", "letters.txt"], "unwritten outputs are left out"
    assert manifest.counts == {"letters": 3}
    assert manifest.settings["settings"]["text"] == "abc"
    assert manifest.processes == 1
    assert manifest.environment["python"].startswith("3.")


def test_working_files_are_not_published() -> None:
    run_stage(recipe(), "letters")
    assert sorted(path.name for path in (RUN / "letters").iterdir()) == ["folder", "letters.txt", "manifest.json"]
    assert [path.name for path in (RUN / PARTIAL).iterdir()] == ["letters.lock"]


def test_a_stage_reads_what_its_inputs_published_and_its_manifest_says_what_that_was() -> None:
    run_stage(recipe(), "letters")
    run_stage(recipe(), "capitals")
    assert (RUN / "capitals/capitals.txt").read_text() == "ABC 0"
    letters, capitals = read_manifest(RUN / "letters"), read_manifest(RUN / "capitals")
    assert letters is not None and capitals is not None
    assert capitals.inputs == {"letters": letters.content_digest}


def test_an_up_to_date_result_is_only_touched(capsys: pytest.CaptureFixture[str]) -> None:
    run_stage(recipe(), "letters")
    manifest = RUN / "letters/manifest.json"
    text, time = manifest.read_text(), manifest.stat().st_mtime_ns
    assert not run_stage(recipe(), "letters")
    assert manifest.read_text() == text
    assert manifest.stat().st_mtime_ns > time
    assert "letters: up to date" in capsys.readouterr().out


def test_a_changed_setting_replaces_the_result() -> None:
    run_stage(recipe(), "letters")
    assert run_stage(recipe("letters.text=xy"), "letters")
    assert (RUN / "letters/letters.txt").read_text() == "xy"


def test_a_stage_whose_inputs_are_missing_or_stale_says_what_to_run() -> None:
    with pytest.raises(InputError, match=r"reads the results of `letters`.*`align run recipe.yaml`"):
        run_stage(recipe(), "capitals")
    run_stage(recipe(), "letters")
    with pytest.raises(InputError, match=r"`align run recipe.yaml --set letters.text=b`"):
        run_stage(recipe("letters.text=b"), "capitals")


def test_a_stage_that_the_recipe_lacks_is_refused() -> None:
    with pytest.raises(InputError, match=r"no stage `sft` in this recipe; add `sft: \{\}`"):
        run_stage(recipe(), "sft")
    with pytest.raises(InputError, match=r"no stage `dance` in this recipe; there are capitals, compare"):
        run_stage(recipe(), "dance")


@pytest.mark.parametrize(("how", "kind"), [("input", InputError), ("not_finite", NotFinite)])
def test_a_failing_stage_publishes_nothing_and_leaves_the_last_result(how: str, kind: type[Exception]) -> None:
    run_stage(recipe(), "letters")
    with pytest.raises(kind):
        run_stage(recipe(f"letters.fail={how}"), "letters")
    assert (RUN / "letters/letters.txt").read_text() == "abc"
    assert make_plan(recipe())["letters"].is_done


@pytest.mark.parametrize(
    "how",
    [
        "full",
        "library_full",
        pytest.param("torch_full", marks=pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")),
    ],
)
def test_a_full_disk_is_explained_and_the_finished_work_is_kept(how: str) -> None:
    with pytest.raises(InputError, match=r"the disk is full.*runs/recipe/shared/.partial") as raised:
        run_stage(recipe(f"letters.fail={how}"), "letters")
    assert raised.value.exit_code == 2
    kept = list((RUN / PARTIAL).glob("letters-*/letters.journal.0"))
    assert len(kept) == 1
    assert not (RUN / "letters").exists()


def test_an_interrupted_stage_resumes_from_its_finished_work() -> None:
    with pytest.raises(KeyboardInterrupt):
        run_stage(recipe("letters.fail=once"), "letters")
    run_stage(recipe("letters.fail=once"), "letters")
    manifest = read_manifest(RUN / "letters")
    assert manifest is not None
    assert manifest.figures["resumed"] is True


def test_a_stage_does_not_resume_from_the_work_of_other_settings() -> None:
    with pytest.raises(KeyboardInterrupt):
        run_stage(recipe("letters.fail=once"), "letters")
    with pytest.raises(KeyboardInterrupt):
        run_stage(recipe("letters.fail=once", "seed=1"), "letters")
    assert len(list((RUN / PARTIAL).glob("letters-*"))) == 1, "the other one is removed"


def test_after_a_closed_gate_another_limit_resumes_from_the_finished_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(all_stages()["letters"]), "gate_settings", ("fail",))
    with pytest.raises(NotFinite):
        run_stage(recipe("letters.fail=not_finite"), "letters")
    run_stage(recipe(), "letters")

    manifest = read_manifest(RUN / "letters")
    assert manifest is not None and manifest.figures["resumed"]
    assert make_plan(recipe("letters.fail=input"))["letters"].state == "stale", "a gate is asked again"


def test_a_kill_between_manifest_and_publication_costs_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("align.pipeline.runner.publish", killed)
        run_stage(recipe(), "letters")
    partial = next((RUN / PARTIAL).glob("letters-*"))
    made = json.loads((partial / "manifest.json").read_text())
    monkeypatch.setattr("align.pipeline.runner._run_and_describe", killed)
    assert run_stage(recipe(), "letters")
    assert json.loads((RUN / "letters/manifest.json").read_text()) == made


def test_a_stage_that_another_process_runs_is_refused() -> None:
    (RUN / PARTIAL).mkdir(parents=True)
    with (RUN / PARTIAL / "letters.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process is running letters"):
            run_stage(recipe(), "letters")
    assert run_stage(recipe(), "letters")


def test_an_output_that_cannot_be_written_is_refused() -> None:
    Path("taken").write_text("a file where a folder should be")
    with pytest.raises(InputError, match=r"taken.*cannot be created.*--set output=DIR"):
        run_stage(recipe("output=taken"), "letters")


@pytest.mark.parametrize("place", [".partial", ".partial/letters.lock", "letters"])
def test_a_refused_file_is_named_wherever_it_is_met(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run_stage(recipe(), "letters")
    refused = RUN / place
    asked = {Path.open: "lock", os.replace: "letters", Path.mkdir: ".partial"}

    def refusing(call: Callable[..., Any]) -> Callable[..., Any]:
        def refuse(first: Any, *rest: Any, **options: Any) -> Any:
            names = [Path(str(name)) for name in (first, *rest[:1])]
            if place.endswith(asked[call]) and any(name in (refused, refused / "x") for name in names):
                raise PermissionError(errno.EACCES, "Permission denied", str(refused))
            return call(first, *rest, **options)

        return refuse

    monkeypatch.setattr(Path, "open", refusing(Path.open))
    monkeypatch.setattr(Path, "mkdir", refusing(Path.mkdir))
    monkeypatch.setattr(os, "replace", refusing(os.replace))
    with pytest.raises(InputError, match=rf"shared/{place}.*(--set output=DIR|output:)"):
        run_stage(recipe("letters.text=xy"), "letters")


def test_a_refused_file_outside_the_run_is_named() -> None:
    with pytest.raises(InputError, match=r"/elsewhere/weights: cannot be read or written \(Permission denied\); check"):
        run_stage(recipe("letters.fail=refused"), "letters")


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="takes root on Linux to make a small disk")
@pytest.mark.parametrize("write", ["torch", "safetensors"])
def test_a_disk_that_a_checkpoint_fills_is_explained(tmp_path: Path, write: str) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        with pytest.raises(InputError, match="the disk is full"), explained_disk_faults(disk, disk):
            if write == "torch":
                torch.save({"weights": torch.zeros(1 << 21)}, disk / "optimizer.pt")
            save_file({"weights": torch.zeros(1 << 21)}, disk / "model.safetensors")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_failing_write_is_put_down_to_a_full_disk_only_if_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> None:
        with explained_disk_faults(tmp_path, tmp_path):
            raise RuntimeError("write failed")

    with pytest.raises(RuntimeError, match="write failed"):
        fails()
    monkeypatch.setattr("align.run.disk_faults._free_bytes", lambda folder: 4096)
    with pytest.raises(InputError, match="the disk is full"):
        fails()


def test_a_damaged_manifest_is_named() -> None:
    run_stage(recipe(), "letters")
    (RUN / "letters/manifest.json").write_text("{")
    with pytest.raises(InputError, match="not a manifest of this version"):
        run_stage(recipe(), "letters")


def test_the_day_on_which_a_run_began_is_kept_for_its_later_stages() -> None:
    undated, dated = recipe("model={path: org/m}"), recipe("model={path: org/m, date: 2026-01-30}")
    RUN.mkdir(parents=True)
    assert run_date(recipe(), RUN) is None
    assert run_date(dated, RUN) == date(2026, 1, 30)
    assert not (RUN / DATE).exists()
    today = run_date(undated, RUN)
    assert (RUN / DATE).read_text() == f"{today}\n"
    (RUN / DATE).write_text("2025-12-31\n")
    assert run_date(undated, Path("runs/recipe/another")) == run_date(undated, RUN) == date(2025, 12, 31)
    (RUN / DATE).write_text("yesterday")
    with pytest.raises(InputError, match=r"date\.txt: not a day"):
        run_date(undated, RUN)


def test_a_day_that_does_not_exist_is_refused() -> None:
    with pytest.raises(InputError, match=r"model\.date"):
        recipe("model={path: org/m, date: '2026-02-30'}")


def test_a_deterministic_recipe_sets_torch_before_its_stage_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.delenv("FLASH_ATTENTION_DETERMINISTIC", raising=False)
    benchmark = torch.backends.cudnn.benchmark
    try:
        run_stage(recipe("deterministic=true"), "letters")
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8", "one of the two values that cuBLAS documents"
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = benchmark
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
        os.environ.pop("FLASH_ATTENTION_DETERMINISTIC", None)
    stale = make_plan(recipe())["letters"]
    assert (stale.state, stale.why) == ("stale", "deterministic: true → none")
