"""Training starts at any stage: without sft, the recipe's model is the policy and the reference."""

import json
from pathlib import Path

import pytest

from align.errors import InputError
from align.pipeline.plan import make_plan
from align.pipeline.recipe import load_recipe
from align.pipeline.runner import run_stage
from align.run.artefacts import read_manifest
from tests.tiny import build_tiny_prompts


@pytest.fixture
def written(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with prompts and human pairs; recipes in it may name the tiny model."""
    monkeypatch.chdir(tmp_path)
    build_tiny_prompts(tmp_path / "prompts.jsonl")
    pairs = [{"prompt": f"Count to {n}.", "chosen": "One two.", "rejected": "No!"} for n in range(8)]
    Path("pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    Path("brevity.py").write_text(
        "def shorter(prompts, completions):\n    return [-len(each) for each in completions]\n"
    )
    return tmp_path


def run_all(blocks: dict[str, object], model: Path) -> dict[str, Path]:
    """Run every stage of a recipe with these blocks; the stages' folders by name."""
    Path("recipe.yaml").write_text(json.dumps({"model": {"path": str(model), "lora": {"r": 2}}, **blocks}))
    recipe = load_recipe("recipe.yaml")
    for stage in recipe.settings:
        run_stage(recipe, stage)
    assert all(step.is_done for step in make_plan(recipe).values())
    return {stage: recipe.directory(stage) for stage in recipe.settings}


OPTIMIZER = {"batch_size": 4, "micro_batch_size": 4}


def test_dpo_alone_trains_the_recipes_model(written: Path, tiny_model_dir: Path) -> None:
    human = {"ai": False, "human": [{"path": "pairs.jsonl"}], "optimizer": OPTIMIZER}
    made = run_all({"dpo": human}, tiny_model_dir)
    assert list(made) == ["dpo"]
    adapter = json.loads((made["dpo"] / "adapter/adapter_config.json").read_text())
    assert Path(adapter["base_model_name_or_path"]).resolve() == tiny_model_dir
    first = json.loads((made["dpo"] / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(0.6931, abs=1e-3), "policy and reference are the same model: log 2"


def test_ppo_alone_reads_the_prompts_trains_the_recipes_model_and_is_evaluated(
    written: Path, tiny_model_dir: Path
) -> None:
    ppo = {
        "rewards": [{"function": "brevity:shorter"}],
        "iterations": 1,
        "rollout_batch": 4,
        "optimizer": OPTIMIZER,
        "sampling": {"max_new_tokens": 4},
    }
    blocks = {
        "prompts": {
            "sources": [{"path": "prompts.jsonl"}],
            "split": {"sft": 0, "preference": 0, "rl": 0.6, "eval": 0.4},
        },
        "ppo": ppo,
        "evaluate": {"sampling": {"max_new_tokens": 4}, "bootstrap": 20},
    }
    made = run_all(blocks, tiny_model_dir)
    assert list(made) == ["sample", "ppo", "evaluate"]
    sample = read_manifest(made["sample"])
    assert sample is not None and (sample.counts["samples"], sample.counts["prompts"]) == (0, 24)
    metrics = json.loads((made["ppo"] / "metrics.jsonl").read_text().splitlines()[0])
    assert metrics["kl_to_reference_k1"] == pytest.approx(0, abs=1e-4), (
        "policy and reference are the same model at first"
    )
    report = json.loads((made["evaluate"] / "report.json").read_text())
    assert (report["reference"], list(report["policies"])) == ("base", ["base", "ppo"])


def test_everything_that_a_recipe_lacks_is_told_at_once(written: Path, tiny_model_dir: Path) -> None:
    Path("recipe.yaml").write_text(json.dumps({"model": {"path": str(tiny_model_dir)}, "dpo": {}}))
    with pytest.raises(InputError) as told:
        load_recipe("recipe.yaml")
    assert str(told.value).splitlines()[1:] == [
        "  line 1  dpo: reads the results of `compare`, which this recipe lacks; add `compare: {}`, with `sample: {}`, "
        "`prompts` and `constitution`, or set `ai: false` and name your own pairs in `human`, to train on those alone"
    ]
