"""Every shipped recipe is valid and documented, and reading a recipe is quick."""

import dataclasses
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from align.data.paths import is_local_path
from align.data.prompts import read_prompts
from align.data.sources import Intake
from align.feedback.records import Revision
from align.pipeline.recipe import load_recipe
from align.records import Sample, write_rows
from align.run.stage import Context
from align.settings.blocks import TrackingBlock
from align.stages import all_stages
from align.stages.sft import SftBlock, gather

ROOT = Path(__file__).parents[2]
RECIPES = sorted(
    path for path in (ROOT / "recipes").rglob("*.y*ml") if (ROOT / "recipes/accelerate") not in path.parents
)
LAUNCHERS = sorted((ROOT / "recipes/accelerate").glob("*.yaml"))
CHECK = """
import sys
from align.__main__ import main
code = main(["plan", *sys.argv[1:]])
heavy = {"torch", "transformers", "trl", "datasets", "peft", "accelerate", "wandb"} & set(sys.modules)
sys.exit(f"imported {sorted(heavy)}" if heavy else code)
"""


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture(autouse=True)
def _root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_the_recipes_that_the_documents_name_are_shipped() -> None:
    names = {path.stem for path in RECIPES}
    assert names >= {"quickstart", "hh-rlhf", "full-fsdp2", "constitutional-server"}
    assert {path.stem for path in LAUNCHERS} == {"ddp", "fsdp2", "zero3"}


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_shipped_recipe_has_no_fault(path: Path) -> None:
    assert load_recipe(path.relative_to(ROOT)).settings


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_recipe_says_at_its_top_how_to_run_it_and_what_to_expect(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    top = "\n".join(lines[: next(number for number, line in enumerate(lines) if not line.startswith("#"))])
    assert re.search(rf"align (run|launch all --recipe) {re.escape(name(path))}", top)
    assert "Expect " in top


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_the_commands_in_a_recipe_name_existing_files(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    files = re.findall(r"\b(?:recipes|constitutions)/[\w./-]+\.(?:ya?ml|jsonl)", text)
    assert name(path) in files
    assert [file for file in files if not (ROOT / file).is_file()] == []


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_planning_a_recipe_imports_no_tensor_library(path: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHECK, name(path), "--set", f"output={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_planning_takes_less_than_two_seconds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "align", "plan", "recipes/quickstart.yaml", "--set", f"output={tmp_path}"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # CPU time, so that other load on the machine is not measured.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


def test_the_quickstart_has_every_stage() -> None:
    assert set(load_recipe("recipes/quickstart.yaml").settings) == set(all_stages())


WITH_REVISIONS = [path for path in RECIPES if re.search(r"^revise:", path.read_text(encoding="utf-8"), re.MULTILINE)]


@pytest.mark.parametrize("path", WITH_REVISIONS, ids=name)
def test_no_recipe_trains_on_the_base_models_own_answers_to_harmful_prompts(path: Path, tmp_path: Path) -> None:
    """Even if all revisions but one were rejected, so that sft could take all the original answers."""
    recipe = load_recipe(path.relative_to(ROOT))
    block = recipe.shared["prompts"]
    files = tuple(source for source in block.sources if is_local_path(source.path))  # the hub is out of reach
    read = read_prompts(block.model_copy(update={"sources": files}))
    prompts = [dataclasses.replace(each, split="sft") for each in read]
    revised = prompts[0]
    samples = [Sample(each.id, each.id, each.prompt, "As it came.", "stop", "sft", each.category) for each in prompts]
    revision = Revision("r", revised.id, revised.prompt, "As it came.", "Better.", ("p",), 0.9, True, "", "sft")
    settings = recipe.settings["sft"]
    assert isinstance(settings, SftBlock)
    everything = settings.model_copy(
        update={"helpful": settings.helpful.model_copy(update={"share": 0.999, "sources": ()})}
    )
    for stage, files in {
        "sample": {"prompts": prompts, "samples": samples},
        "revise": {"revisions": [revision]},
    }.items():
        (tmp_path / stage).mkdir()
        for file, rows in files.items():
            write_rows(tmp_path / stage / f"{file}.jsonl", rows)
    folders = {stage: tmp_path / stage for stage in ("sample", "revise")}
    context = Context("sft", everything, {}, folders, tmp_path, 0, "test", TrackingBlock())
    own = [row for row in gather(context, Intake()) if row.source == "own"]

    harmful = {prompt.prompt for prompt in prompts if prompt.source == "recipes/prompts/harmful.jsonl"}
    assert len(own) > 300
    assert not harmful & {row.prompt for row in own}


@pytest.mark.parametrize("path", LAUNCHERS, ids=name)
def test_accelerate_knows_every_key_of_a_launch_configuration(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes == 8
    assert config.distributed_type.value == {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED"}[path.stem]


@pytest.mark.parametrize("path", LAUNCHERS, ids=name)
def test_accelerate_turns_a_launch_configuration_into_a_command(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `accelerate launch` would set for the processes, without starting them."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    monkeypatch.setattr(os, "environ", {**os.environ, "ACCELERATE_USE_CPU": "false"})
    if path.stem == "zero3":
        monkeypatch.setattr("accelerate.commands.launch.is_deepspeed_available", lambda: True, raising=False)
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "-m", "align", "run", "sft"])
    arguments, _, _ = _validate_launch_command(arguments)
    environment = prepare_multi_gpu_env(arguments)
    if path.stem == "fsdp2":
        assert environment["ACCELERATE_USE_FSDP"] == "true"
        assert environment["FSDP_VERSION"] == "2"
