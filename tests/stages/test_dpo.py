"""Direct preference optimization against soft labels, with the SFT policy as reference."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from align.errors import InputError
from align.records import read_jsonl
from align.stages.dpo import STAGE, DpoBlock
from tests.stages.training import SMALL_LORA, context, pair, run, upstream, weights

QUICK = {"optimizer": {"learning_rate": 5e-3, "batch_size": 4, "micro_batch_size": 2}, "epochs": 3, "beta": 0.5}


def upstreams(tmp_path: Path, model: Path, probability: float = 0.9) -> dict[str, Path]:
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft/model").symlink_to(model)
    pairs = upstream(tmp_path, "compare", pairs=[pair(n, probability) for n in range(12)])
    return {"sft": tmp_path / "sft", "compare": pairs}


def trainer_on(tmp_path: Path, model_dir: Path, lora: dict[str, Any] | None, rows: list[dict[str, Any]]) -> Any:
    """A DPO trainer whose policy is not its reference, built as the stage builds it."""
    import torch
    from datasets import Dataset

    from align.models.loading import load_tokenizer
    from align.training.models import load_policy
    from align.training.trainers import SoftLabelDPOTrainer
    from align.training.trl_configs import DPOConfig, training_config

    made = context(STAGE, QUICK, model_dir, tmp_path / "out", lora=lora)
    config = training_config(DPOConfig, made, torch.float32, beta=0.5, max_length=None)
    model = load_policy(str(model_dir), made.shared["model"], torch.float32, 1)
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    reference = None if lora else load_policy(str(model_dir), made.shared["model"], torch.float32, 1)
    return SoftLabelDPOTrainer(
        model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(str(model_dir)),
        stage="dpo",
        ref_model=reference,
    )


@pytest.mark.parametrize("lora", [None, SMALL_LORA], ids=["full", "lora"])
def test_the_loss_is_the_soft_formula_over_log_ratios_to_the_sft_policy(
    tmp_path: Path, tiny_model_dir: Path, lora: dict[str, Any] | None
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    rows: list[dict[str, Any]] = [
        {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9, 10, 1], "rejected_ids": [11, 1], "probability": 0.8},
        {"prompt_ids": [5], "chosen_ids": [20, 1], "rejected_ids": [21, 22, 23, 1], "probability": 1.0},
    ]
    trainer = trainer_on(tmp_path, tiny_model_dir, lora, rows)
    reference = AutoModelForCausalLM.from_pretrained(tiny_model_dir)

    def logprob(model: Any, prompt: list[int], completion: list[int]) -> float:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + completion])).logits[0].double().log_softmax(-1)
        return sum(float(logits[len(prompt) - 1 + n, token]) for n, token in enumerate(completion))

    expected = 0.0
    for row in rows:
        ratios = [
            logprob(trainer.model, row["prompt_ids"], row[side]) - logprob(reference, row["prompt_ids"], row[side])
            for side in ("chosen_ids", "rejected_ids")
        ]
        margin = 0.5 * (ratios[0] - ratios[1])
        p = row["probability"]
        expected += p * math.log1p(math.exp(-margin)) + (1 - p) * math.log1p(math.exp(margin))
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    assert abs(expected / 2 - math.log(2)) > 0.01
    torch.testing.assert_close(float(loss.detach()), expected / 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lora", [None, SMALL_LORA], ids=["full", "lora"])
def test_pairs_separate_and_the_first_loss_is_that_of_an_unchanged_policy(
    tmp_path: Path, tiny_model_dir: Path, lora: dict[str, Any] | None
) -> None:
    from transformers import AutoModelForCausalLM

    outcome = run(STAGE, QUICK, tiny_model_dir, tmp_path / "out", upstreams(tmp_path, tiny_model_dir), lora=lora)
    rows = list(read_jsonl(tmp_path / "out/metrics.jsonl"))
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert rows[-1]["rewards/margins"] > 0.2
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert outcome.counts["pairs"] == outcome.counts["pairs_ai"] == 12
    AutoModelForCausalLM.from_pretrained(tmp_path / "out/model")
    adapter = sorted(path.name for path in (tmp_path / "out").glob("adapter/*"))
    assert adapter == (["adapter_config.json", "adapter_model.safetensors"] if lora else [])


def test_a_label_of_one_half_pulls_the_policy_back_to_its_reference(tmp_path: Path, tiny_model_dir: Path) -> None:
    """With p = 1/2 the loss has its minimum where the policy starts, so the policy does not move."""
    inputs = upstreams(tmp_path, tiny_model_dir, probability=0.5)
    run(STAGE, QUICK, tiny_model_dir, tmp_path / "out", inputs)
    rows = list(read_jsonl(tmp_path / "out/metrics.jsonl"))
    assert max(abs(row["rewards/margins"]) for row in rows) < 0.05


def test_human_pairs_join_the_judge_s_or_stand_alone(tmp_path: Path, tiny_model_dir: Path) -> None:
    human = tmp_path / "human.jsonl"
    human.write_text(
        "".join(json.dumps({"prompt": f"p{n}", "chosen": "yes", "rejected": "no"}) + "\n" for n in range(3))
    )
    block = {**QUICK, "human": [{"path": str(human)}], "epochs": 1}
    inputs = upstreams(tmp_path, tiny_model_dir)
    outcome = run(STAGE, block, tiny_model_dir, tmp_path / "both", inputs)
    assert (outcome.counts["pairs_ai"], outcome.counts["pairs_human"], outcome.counts["pairs"]) == (12, 3, 15)
    alone = {**block, "ai": False}
    settings = DpoBlock.model_validate(alone)
    assert (STAGE.inputs(settings), STAGE.optional_inputs(settings)) == ((), ("sft",))
    assert STAGE.files(DpoBlock.model_validate(alone)) == (str(human),)
    outcome = run(STAGE, alone, tiny_model_dir, tmp_path / "alone", {"sft": inputs["sft"]})
    assert outcome.counts["pairs"] == 3


def test_a_pair_that_is_too_long_is_counted_and_named(tmp_path: Path, tiny_model_dir: Path) -> None:
    inputs = upstreams(tmp_path, tiny_model_dir)
    long = pair(99, chosen="long " * 300)
    upstream(tmp_path, "compare", pairs=[*(pair(n) for n in range(4)), long])
    outcome = run(STAGE, {**QUICK, "max_length": 200, "epochs": 1}, tiny_model_dir, tmp_path / "out", inputs)
    assert (outcome.counts["pairs"], outcome.counts["pairs_too_long"]) == (4, 1)
    assert outcome.figures["pairs_too_long"] == [long.id]


def test_another_loss_of_trl_s_needs_labels_that_are_certain(tmp_path: Path, tiny_model_dir: Path) -> None:
    block = {**QUICK, "epochs": 1, "trl": {"loss_type": ["ipo"]}}
    inputs = upstreams(tmp_path, tiny_model_dir, probability=0.9)
    with pytest.raises(InputError, match=r"dpo.trl.loss_type: .* 12 of 12 pairs have soft labels"):
        run(STAGE, block, tiny_model_dir, tmp_path / "soft", inputs)
    upstream(tmp_path, "compare", pairs=[pair(n, 1.0) for n in range(8)])
    run(STAGE, block, tiny_model_dir, tmp_path / "hard", inputs)
    rows = list(read_jsonl(tmp_path / "hard/metrics.jsonl"))
    assert rows[0]["loss"] == pytest.approx((1 / (2 * 0.5)) ** 2, rel=1e-4)


def test_label_smoothing_that_trl_would_ignore_is_an_error(tmp_path: Path, tiny_model_dir: Path) -> None:
    inputs = upstreams(tmp_path, tiny_model_dir, probability=1.0)
    block = {**QUICK, "trl": {"label_smoothing": 0.1}}
    with pytest.raises(InputError, match="TRL ignores it with the loss `sigmoid`"):
        run(STAGE, block, tiny_model_dir, tmp_path / "out", inputs)


def test_no_pairs_at_all_is_a_fault() -> None:
    (fault,) = STAGE.check(DpoBlock(ai=False), {})
    assert fault.startswith("dpo.human: no pairs to train on")


def test_the_policy_moves_and_the_reference_does_not(tmp_path: Path, tiny_model_dir: Path) -> None:
    before = weights(tiny_model_dir)
    run(STAGE, {**QUICK, "epochs": 1}, tiny_model_dir, tmp_path / "out", upstreams(tmp_path, tiny_model_dir))
    after = weights(tmp_path / "out/model")
    assert any(not after[name].equal(before[name]) for name in after)
    assert all(weights(tiny_model_dir)[name].equal(before[name]) for name in before)


def test_micro_batches_do_not_change_the_result_though_the_last_batch_is_short(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    """11 pairs in batches of 4 end with one of 3, which micro-batches of 2 divide into 2 and 1."""
    import torch

    inputs = upstreams(tmp_path, tiny_model_dir)
    upstream(tmp_path, "compare", pairs=[pair(n, 0.9) for n in range(11)])
    for size in (1, 2, 4):
        optimizer = {"learning_rate": 1e-3, "batch_size": 4, "micro_batch_size": size}
        block = {**QUICK, "optimizer": optimizer, "epochs": 1}
        run(STAGE, block, tiny_model_dir, tmp_path / str(size), inputs)
    whole, *parts = (weights(tmp_path / f"{size}/model") for size in (4, 2, 1))
    for part in parts:
        for name in whole:
            torch.testing.assert_close(part[name], whole[name], rtol=1e-3, atol=2e-4)
    losses = [[row["loss"] for row in read_jsonl(tmp_path / f"{size}/metrics.jsonl")] for size in (4, 2, 1)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[2] == pytest.approx(losses[0], rel=1e-3)
