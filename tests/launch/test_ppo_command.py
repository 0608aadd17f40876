"""PPO by the real command: its result does not depend on batching or processes, and can be loaded elsewhere."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.launch.pipeline import Run, in_process, optimizer, rows, weights

FIGURES = (
    "score",
    "reward",
    "kl_to_reference_k1",
    "policy_loss",
    "value_loss",
    "gradient_norm",
    "entropy",
    "ratio",
    "clip_fraction",
    "explained_variance",
    "ptx_loss",
)
NOT_REPEATED = ("seconds_", "tokens_per_second", "peak_memory_gb")
DRAWN = ("iteration", "prompt_id", "completion", "tokens", "finish_reason")


@pytest.fixture
def run(finished: Run, tmp_path: Path) -> Run:
    """The finished pipeline without PPO's results."""
    return finished.copy(tmp_path / "copy", without=["ppo", "evaluate"])


def drawn(run: Run) -> list[dict[str, Any]]:
    """The sampled completions, row by row."""
    return [{name: row[name] for name in DRAWN} for row in run.rows("ppo/rollouts.jsonl")]


def largest_difference(first: Run, second: Run) -> float:
    """Between the weights that two runs of PPO end with."""
    one, two = (weights(run.stage("ppo") / "model") for run in (first, second))
    assert one.keys() == two.keys()
    return max(float((one[name] - two[name]).abs().max()) for name in one)


def assert_same_training(first: Run, second: Run) -> None:
    """The same completions, and figures and weights that differ by the rounding of sums alone."""
    assert drawn(first) == drawn(second)
    for one, two in zip(first.rows("ppo/metrics.jsonl"), second.rows("ppo/metrics.jsonl"), strict=True):
        for name in FIGURES:
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), (one["step"], name)
    assert largest_difference(first, second) < 1e-5


def moved(run: Run) -> float:
    """How far PPO moved the policy, the scale for the differences above."""
    before, after = (weights(run.stage(stage) / "model") for stage in ("sft", "ppo"))
    return max(float((before[name] - after[name]).abs().max()) for name in before)


def test_training_moves_the_policy_and_measures_itself(finished: Run) -> None:
    metrics = finished.rows("ppo/metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    assert moved(finished) > 1e-3
    assert all(row["gradient_norm"] > 0 and math.isfinite(row["value_loss"]) for row in metrics)
    assert all(row["first_log_ratio"] < 1e-4 for row in metrics), "sampling with a cache is the training pass, rounded"
    assert all(0 < row["sampling_gap"] < 1e-5 for row in metrics), "log-probs are kept from sampling"


def test_the_reference_is_the_initial_policy_and_never_changes(finished: Run) -> None:
    first, *later = finished.rows("ppo/metrics.jsonl")
    assert abs(first["kl_to_reference_k1"]) < 1e-5
    assert abs(first["kl_to_reference_k3"]) < 1e-5
    assert all(row["kl_to_reference_k3"] > 0 for row in later)
    adapted = {name for name, tensor in weights(finished.stage("ppo") / "model").items() if is_moved(finished, name)}
    assert adapted and not any("embed" in name or "norm" in name or "lm_head" in name for name in adapted)


def is_moved(run: Run, name: str) -> bool:
    before, after = (weights(run.stage(stage) / "model")[name] for stage in ("sft", "ppo"))
    return not bool((before == after).all())


def test_each_row_of_a_rollout_is_written_once(finished: Run) -> None:
    written = finished.rows("ppo/rollouts.jsonl")
    assert [row["iteration"] for row in written] == [iteration for iteration in (1, 2, 3, 4) for _ in range(16)]
    prompts = {row["id"] for row in finished.rows("sample/prompts.jsonl") if row["split"] == "rl"}
    assert {row["prompt_id"] for row in written} == prompts, "64 rows go round them all"
    metrics = finished.rows("ppo/metrics.jsonl")
    for iteration in (1, 2, 3, 4):
        scores = [row["score"] for row in written if row["iteration"] == iteration]
        assert sum(scores) / 16 == pytest.approx(metrics[iteration - 1]["score"], rel=1e-5)


def test_the_size_of_a_micro_batch_does_not_matter(finished: Run, run: Run) -> None:
    run.run_stage("ppo", ppo__optimizer=optimizer(learning_rate=3e-3, micro_batch_size=1))
    assert_same_training(finished, run)


def test_the_size_of_a_sampling_batch_does_not_matter(finished: Run, run: Run) -> None:
    run.run_stage("ppo", ppo__sampling__batch_size=3)
    assert_same_training(finished, run)


def test_the_number_of_processes_does_not_matter(finished: Run, run: Run) -> None:
    run.make("launch", "ppo", "--recipe", "tiny.yaml", "--nproc", "2")
    assert run.manifest("ppo")["processes"] == 2
    assert_same_training(finished, run)


def test_a_run_killed_twice_ends_like_an_undisturbed_one(finished: Run, run: Run) -> None:
    command = ("run", "ppo", "--recipe", "tiny.yaml")
    for iteration in (1, 3):
        checkpoint = f".partial/ppo-*/checkpoint/iteration-{iteration:06d}"
        assert run.kill_when(lambda pattern=checkpoint: any(run.own.glob(pattern)), *command)
        assert not run.stage("ppo").exists()
    run.make(*command)

    for name in ("rollouts.jsonl", "model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (run.stage("ppo") / name).read_bytes() == (finished.stage("ppo") / name).read_bytes(), name
    assert repeated(run) == repeated(finished)


def repeated(run: Run) -> list[dict[str, Any]]:
    """Every figure except those of time and memory."""
    metrics = run.rows("ppo/metrics.jsonl")
    return [{name: value for name, value in row.items() if not name.startswith(NOT_REPEATED)} for row in metrics]


def test_the_policy_loads_in_plain_transformers_and_answers(finished: Run) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = finished.stage("ppo") / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert type(model).__name__ == "LlamaForCausalLM"
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Where?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    torch.manual_seed(0)
    answer = model.generate(**ids, max_new_tokens=64, do_sample=True, pad_token_id=tokenizer.pad_token_id)
    assert answer.shape[1] < ids["input_ids"].shape[1] + 64, "it ends its turn"


def test_the_adapter_beside_the_policy_is_the_policy(finished: Run) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    trunk = AutoModelForCausalLM.from_pretrained(finished.stage("sft") / "model")
    merged = PeftModel.from_pretrained(trunk, finished.stage("ppo") / "adapter").merge_and_unload().state_dict()
    for name, tensor in weights(finished.stage("ppo") / "model").items():
        assert float((merged[name] - tensor).abs().max()) < 1e-6, name


def test_a_value_head_on_the_policy_works_too(finished: Run, run: Run) -> None:
    run.run_stage("ppo", ppo__value="head")
    one, two = run.rows("ppo/metrics.jsonl"), finished.rows("ppo/metrics.jsonl")
    assert one[0]["score"] == two[0]["score"], "what the untrained policy samples does not depend on the value"
    assert one[-1]["value_loss"] != two[-1]["value_loss"]
    assert all(row["first_log_ratio"] < 1e-4 for row in one)
    assert moved(run) > 1e-3


def test_every_weight_can_be_trained(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = run.root / "pairs.jsonl"
    talks = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in run.rows("compare/pairs.jsonl")]
    pairs.write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    full = {
        **json.loads((run.root / "tiny.yaml").read_text()),
        "sft": {"revisions": False, "helpful": {"sources": [{"path": pairs.name}]}, "optimizer": optimizer()},
        "reward": {"ai": False, "human": [{"path": pairs.name}], "optimizer": optimizer()},
    }
    for stage in ("revise", "compare", "dpo", "evaluate"):
        del full[stage]
    full["model"]["lora"] = None
    (run.root / "full.yaml").write_text(json.dumps(full))
    for stage in ("sample", "sft", "reward", "ppo"):
        assert in_process(run.root, monkeypatch, "run", stage, "--recipe", "full.yaml") == 0

    ppo = run.root / "runs/full/shared/ppo"
    metrics = rows(ppo / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    assert all(row["first_log_ratio"] < 1e-4 for row in metrics)
    assert abs(metrics[0]["kl_to_reference_k1"]) < 1e-5 < metrics[-1]["kl_to_reference_k3"]
    before, after = weights(run.root / "runs/full/shared/sft/model"), weights(ppo / "model")
    assert before.keys() == after.keys()
    still = [name for name in before if bool((before[name] == after[name]).all())]
    assert still == []
    assert not (ppo / "adapter").exists()
