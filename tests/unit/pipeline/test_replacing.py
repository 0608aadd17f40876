"""Finished models are not replaced unasked, edited results are noticed, and equal results of other runs are reused."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from align.errors import InputError
from align.pipeline.launch import Launch, run_recipe
from align.pipeline.plan import Step, make_plan, stage_slice
from align.pipeline.recipe import load_recipe, recipe_model
from align.pipeline.runner import run_stage
from align.run.artefacts import MANIFEST, read_manifest
from align.stages import all_stages
from tests.fakes import add_fake_stages, remove_fake_stages

RUNS = Path("runs")
FIRST = RUNS / "recipe/shared"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    add_fake_stages()
    monkeypatch.setattr(type(all_stages()["capitals"]), "trains", True)
    recipe_model.cache_clear()
    Path("recipe.yaml").write_text("letters: {}\ncapitals: {}\n")
    yield tmp_path
    remove_fake_stages()
    recipe_model.cache_clear()


def run(*overrides: str, force: bool = False) -> dict[str, bool]:
    recipe = load_recipe("recipe.yaml", overrides)
    return {stage: run_stage(recipe, stage, force) for stage in recipe.settings}


def step(stage: str, *overrides: str) -> Step:
    return make_plan(load_recipe("recipe.yaml", overrides))[stage]


def test_a_finished_model_is_only_replaced_by_force() -> None:
    run()
    with pytest.raises(InputError, match=r"(?s)capitals: already trained.*capitals\.ending:  → s.*name=NAME.*--force"):
        run("capitals.ending=s")
    assert (FIRST / "capitals/capitals.txt").read_text() == "ABC 0"
    assert run("capitals.ending=s", force=True) == {"letters": False, "capitals": True}
    assert (FIRST / "capitals/capitals.txt").read_text() == "ABCs 0"


def test_a_whole_run_stops_before_the_first_stage_if_a_later_one_would_replace_a_model() -> None:
    run()
    with pytest.raises(InputError, match="capitals: already trained"):
        run_recipe(load_recipe("recipe.yaml", ["letters.text=b"]), Launch())
    assert (FIRST / "letters/letters.txt").read_text() == "abc"


def test_what_is_not_trained_is_replaced_as_before_and_so_is_a_model_that_lost_a_file() -> None:
    run()
    recipe = load_recipe("recipe.yaml", ["letters.text=b"])
    assert run_stage(recipe, "letters")
    run(force=True)
    (FIRST / "capitals/capitals.txt").unlink()
    assert not step("capitals").replaces
    assert run() == {"letters": False, "capitals": True}


def test_a_run_with_another_name_reuses_every_stage_that_a_setting_does_not_touch(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run()
    capsys.readouterr()
    assert step("letters", "name=other").reuses == FIRST / "letters"
    assert run("name=other", "capitals.ending=s") == {"letters": False, "capitals": True}
    assert "letters: reused from runs/recipe/shared/letters" in capsys.readouterr().out
    assert (RUNS / "other/shared/letters/folder/inner/file").read_text() == "inside"
    assert (RUNS / "other/shared/capitals/capitals.txt").read_text() == "ABCs 0"
    assert read_manifest(RUNS / "other/shared/letters") == read_manifest(FIRST / "letters")
    assert [each.state for each in make_plan(load_recipe("recipe.yaml")).values()] == ["done", "done"]


def test_an_edited_result_is_not_reused_and_is_stale_in_its_own_run() -> None:
    run()
    (FIRST / "capitals/capitals.txt").write_text("XYZ 0")
    (FIRST / "letters/folder/inner/file").write_text("edited")
    found = step("letters")
    assert (found.state, found.why) == ("stale", "folder/inner/file has changed since it was written")
    assert step("letters", "name=other").reuses is None
    assert run_stage(load_recipe("recipe.yaml"), "letters"), "letters are no model"
    with pytest.raises(InputError, match=r"capitals\.txt has changed since it was written"):
        run()


def test_an_edit_with_an_older_time_is_noticed_and_a_touched_file_is_not_an_edit() -> None:
    run()
    os.utime(FIRST / "letters/letters.txt")
    assert step("letters").is_done
    Path("older").write_text("xyz")
    os.utime("older", (1, 1))
    os.replace("older", FIRST / "letters/letters.txt")
    assert step("letters").state == "stale"


def test_unchanged_files_are_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    run()
    manifest = FIRST / "letters" / MANIFEST
    os.utime(manifest)
    monkeypatch.setattr("align.run.edited_files.file_digest", lambda path: pytest.fail(f"read {path}"))
    assert step("letters").is_done


def test_only_a_stage_that_trains_depends_on_lora(tiny_model_dir: Path) -> None:
    text = f"model: {{path: {tiny_model_dir}}}\nprompts: {{sources: [{{path: p.jsonl}}]}}\nsample: {{}}\n"
    human = "dpo: {ai: false, human: [{path: p.jsonl}]}\n"
    Path("p.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    Path("recipe.yaml").write_text(text + human)
    low, high = (load_recipe("recipe.yaml", [f"model.lora.r={rank}"]) for rank in (8, 16))
    assert stage_slice(low, "sample") == stage_slice(high, "sample")
    assert stage_slice(low, "dpo") != stage_slice(high, "dpo")
