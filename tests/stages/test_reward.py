"""The reward model: soft labels, the split by prompt, held-out figures, and the scores that `model/` gives."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from align.records import Message, PreferencePair, read_jsonl, read_rows
from align.stages.reward import STAGE, RewardBlock, prompt_id, split_by_prompt
from align.training.held_out import ScoredPair
from tests.stages.training import SMALL_LORA, context, pair, run, upstream, weights

QUICK = {"optimizer": {"learning_rate": 1e-2, "batch_size": 4, "micro_batch_size": 2}, "epochs": 2, "held_out": 0.3}


def upstreams(tmp_path: Path, model: Path, probability: float = 0.9, count: int = 24) -> dict[str, Path]:
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft/model").symlink_to(model)
    pairs = upstream(tmp_path, "compare", pairs=[pair(n, probability) for n in range(count)])
    return {"sft": tmp_path / "sft", "compare": pairs}


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of the training steps."""
    return [row for row in read_jsonl(folder / "metrics.jsonl") if "loss" in row]


@pytest.mark.parametrize("lora", [None, SMALL_LORA], ids=["full", "lora"])
def test_pairs_separate_on_held_out_prompts(tmp_path: Path, tiny_model_dir: Path, lora: dict[str, Any] | None) -> None:
    outcome = run(STAGE, QUICK, tiny_model_dir, tmp_path / "out", upstreams(tmp_path, tiny_model_dir), lora=lora)
    *rows, tested = read_jsonl(tmp_path / "out/metrics.jsonl")
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert tested["step"] == outcome.counts["steps"] + 1
    assert tested["held_out/accuracy/mean"] == outcome.figures["accuracy"]["mean"]
    held_out = list(read_rows(tmp_path / "out/held_out.jsonl", ScoredPair))
    assert outcome.counts["pairs"] + len(held_out) == 24
    assert outcome.counts["pairs_held_out"] == len(held_out) > 2
    assert all(scored.margin > 0 for scored in held_out)
    assert outcome.figures["accuracy"]["mean"] == 1.0
    assert outcome.figures["accuracy"]["low"] < 1.0
    assert outcome.figures["longer_wins"]["mean"] == 1.0
    assert outcome.figures["shorter_wins"]["mean"] == 0.0
    scores = [score for scored in held_out for score in (scored.chosen_score, scored.rejected_score)]
    mean = sum(scores) / len(scores)
    assert outcome.figures["score_mean"] == pytest.approx(mean)
    assert outcome.figures["score_std"] == pytest.approx(math.sqrt(sum((s - mean) ** 2 for s in scores) / len(scores)))
    assert outcome.figures["base"] == "sft"


def test_the_stage_ends_with_a_table_of_what_the_model_is_worth(
    tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = run(STAGE, QUICK, tiny_model_dir, tmp_path / "out", upstreams(tmp_path, tiny_model_dir), lora=SMALL_LORA)
    shown = capsys.readouterr().out
    count = outcome.counts["pairs_held_out"]
    assert f"test: {count} held-out pairs of {count} prompts" in shown
    assert "the shorter answer" in shown and "calibration error" in shown


@pytest.mark.parametrize("lora", [None, SMALL_LORA], ids=["full", "lora"])
def test_plain_transformers_gives_the_scores_of_held_out_jsonl_alone_and_padded(
    tmp_path: Path, tiny_model_dir: Path, lora: dict[str, Any] | None
) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    run(STAGE, QUICK, tiny_model_dir, tmp_path / "out", upstreams(tmp_path, tiny_model_dir), lora=lora)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out/model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out/model")
    assert model.config.num_labels == 1
    assert tokenizer.padding_side == "right"
    assert tokenizer.pad_token_id == model.config.pad_token_id != tokenizer.eos_token_id
    pairs = {each.id: each for each in read_rows(tmp_path / "compare/pairs.jsonl", PreferencePair)}
    for scored in list(read_rows(tmp_path / "out/held_out.jsonl", ScoredPair))[:3]:
        both = pairs[scored.id]
        texts = [
            tokenizer.apply_chat_template(
                [message.as_dict() for message in (*both.prompt, *side)], tokenize=False
            ).removesuffix("\n")
            for side in (both.chosen, both.rejected)
        ]
        assert all(text.endswith("<|im_end|>") for text in texts)
        expected = torch.tensor([scored.chosen_score, scored.rejected_score])
        with torch.no_grad():
            padded = model(**tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)).logits[:, 0]
            alone = [
                model(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits[0, 0] for text in texts
            ]
        torch.testing.assert_close(padded, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.stack(alone), expected, rtol=1e-4, atol=1e-4)


def test_the_loss_is_the_soft_formula_over_scores_at_the_end_of_each_conversation(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    import torch
    from datasets import Dataset

    from align.models.heads import pooled_scores
    from align.models.loading import load_tokenizer
    from align.training.models import load_reward_model, set_separate_pad_token
    from align.training.trainers import SoftLabelRewardTrainer
    from align.training.trl_configs import RewardConfig, training_config

    rows: list[dict[str, Any]] = [
        {"chosen_ids": [5, 6, 7, 8, 1], "rejected_ids": [5, 6, 1], "probability": 0.8},
        {"chosen_ids": [9, 1], "rejected_ids": [9, 10, 11, 12, 13, 1], "probability": 0.55},
    ]
    made = context(STAGE, QUICK, tiny_model_dir, tmp_path / "out", lora=None)
    config = training_config(RewardConfig, made, torch.float32, max_length=None)
    model = load_reward_model(str(tiny_model_dir), made.shared["model"], torch.float32, 1)
    tokenizer = set_separate_pad_token(load_tokenizer(str(tiny_model_dir)))
    trainer = SoftLabelRewardTrainer(
        model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, stage="reward"
    )

    def score(ids: list[int]) -> float:
        with torch.no_grad():
            states = model.model(input_ids=torch.tensor([ids])).last_hidden_state
        return float(states[0, -1] @ model.score.weight[0].detach())

    expected = 0.0
    for row in rows:
        margin = score(row["chosen_ids"]) - score(row["rejected_ids"])
        p = row["probability"]
        expected += p * math.log1p(math.exp(-margin)) + (1 - p) * math.log1p(math.exp(margin))
    batch = trainer.data_collator(rows)
    loss = trainer.compute_loss(model, batch)
    torch.testing.assert_close(float(loss.detach()), expected / 2, rtol=1e-4, atol=1e-5)
    by_length = pooled_scores(model, batch["input_ids"], batch["attention_mask"])
    torch.testing.assert_close(model(batch["input_ids"], batch["attention_mask"]).logits[:, 0], by_length)


def test_soft_labels_are_learnt_as_margins(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Trained for long on one kind of pair, the margin converges to the label's log-odds."""
    block = {**QUICK, "epochs": 15, "held_out": 0.2}
    inputs = upstreams(tmp_path, tiny_model_dir, probability=0.7)
    outcome = run(STAGE, block, tiny_model_dir, tmp_path / "out", inputs)
    margins = [scored.margin for scored in read_rows(tmp_path / "out/held_out.jsonl", ScoredPair)]
    assert sum(margins) / len(margins) == pytest.approx(math.log(0.7 / 0.3), abs=0.35)
    assert outcome.figures["expected_calibration_error"] < 0.1


def test_the_head_starts_at_the_papers_spread_and_stays_float32(tmp_path: Path, tiny_model_dir: Path) -> None:
    import torch

    from align.training.models import ScoreHead, load_reward_model

    torch.manual_seed(0)
    assert float(ScoreHead(4096).weight.detach().std()) == pytest.approx(4097**-0.5, rel=0.05)
    made = context(STAGE, QUICK, tiny_model_dir, tmp_path / "out", lora=SMALL_LORA)
    model = load_reward_model(str(tiny_model_dir), made.shared["model"], torch.bfloat16, 1)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert any("score" in name for name in trained)
    assert {value.dtype for value in trained.values()} == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(input_ids=torch.tensor([[5, 6, 1]])).logits.dtype == torch.float32


def test_no_prompt_is_on_both_sides_of_the_split() -> None:
    pairs = [pair(n % 100, chosen=f"Yes {n}.") for n in range(300)]
    training, held_out = split_by_prompt(pairs, 0.25)
    assert len(training) + len(held_out) == 300
    assert 0.15 < len(held_out) / 300 < 0.35
    assert not {prompt_id(each.prompt) for each in training} & {prompt_id(each.prompt) for each in held_out}
    again, _ = split_by_prompt(list(reversed(pairs)), 0.25)
    assert {each.id for each in again} == {each.id for each in training}
    assert split_by_prompt(pairs, 0.0) == (pairs, [])


def test_pairs_that_are_too_long_are_counted_on_both_sides(tmp_path: Path, tiny_model_dir: Path) -> None:
    inputs = upstreams(tmp_path, tiny_model_dir)
    long = [pair(n, chosen="long " * 200) for n in range(100, 130)]
    upstream(tmp_path, "compare", pairs=[*(pair(n) for n in range(20)), *long])
    block = {**QUICK, "max_length": 150, "epochs": 1}
    outcome = run(STAGE, block, tiny_model_dir, tmp_path / "out", inputs)
    assert outcome.counts["pairs_too_long"] == 30
    assert set(outcome.figures["pairs_too_long"]) == {each.id for each in long}
    assert outcome.counts["pairs"] + outcome.counts["pairs_held_out"] == 20
    assert len(list(read_jsonl(tmp_path / "out/held_out.jsonl"))) == outcome.counts["pairs_held_out"]


def test_without_held_out_pairs_the_scale_comes_from_training_pairs(tmp_path: Path, tiny_model_dir: Path) -> None:
    block = {**QUICK, "held_out": 0, "epochs": 1}
    outcome = run(STAGE, block, tiny_model_dir, tmp_path / "out", upstreams(tmp_path, tiny_model_dir))
    assert outcome.figures["accuracy"] is None
    assert outcome.figures["score_std"] > 0
    assert (tmp_path / "out/held_out.jsonl").read_text() == ""


def test_human_pairs_and_the_base_model_need_nothing_upstream(tmp_path: Path, tiny_model_dir: Path) -> None:
    rows = [{"prompt": f"p{n}", "chosen": "Yes indeed!", "rejected": "no"} for n in range(12)]
    human = tmp_path / "human.jsonl"
    human.write_text("".join(json.dumps(row) + "\n" for row in rows))
    block = {**QUICK, "ai": False, "base": "model", "human": [{"path": str(human)}], "epochs": 1}
    settings = RewardBlock.model_validate(block)
    assert STAGE.inputs(settings) == ()
    assert (STAGE.inputs(RewardBlock()), STAGE.optional_inputs(RewardBlock())) == (("compare",), ("sft",))
    assert STAGE.files(settings) == (str(human),)
    outcome = run(STAGE, block, tiny_model_dir, tmp_path / "out")
    assert outcome.figures["base"] == "model"
    assert set(outcome.figures["accuracy_by_source"]) == {"human"}


def test_no_pairs_at_all_is_a_fault() -> None:
    (fault,) = STAGE.check(RewardBlock(ai=False), {})
    assert fault.startswith("reward.human: no pairs to train on")


def test_people_s_pairs_are_mixed_in_by_a_share_and_tested_apart(tmp_path: Path, tiny_model_dir: Path) -> None:
    human = tmp_path / "human.jsonl"
    rows = [{"prompt": f"How do I do {n}?", "chosen": "Yes indeed!", "rejected": "no"} for n in range(60)]
    human.write_text("".join(json.dumps(row) + "\n" for row in rows))
    block = {**QUICK, "human": [{"path": str(human), "name": "helpful"}], "human_share": 0.5, "epochs": 1}
    outcome = run(STAGE, block, tiny_model_dir, tmp_path / "out", upstreams(tmp_path, tiny_model_dir, count=20))
    sources = outcome.figures["pairs_by_source"]
    assert {name: sources["training"][name] + sources["held_out"][name] for name in ("ai", "helpful")} == {
        "ai": 20,
        "helpful": 20,
    }
    assert outcome.counts["pairs_human_left_out"] == 40
    tested = {name: found["n"] for name, found in outcome.figures["accuracy_by_source"].items()}
    assert tested == sources["held_out"]


@pytest.mark.parametrize("alone", [{"ai": False, "human": ({"path": "a/b"},)}, {"ai": True}])
def test_a_share_of_nothing_is_a_fault(alone: dict[str, Any]) -> None:
    (fault,) = STAGE.check(RewardBlock.model_validate({**alone, "human_share": 0.4}), {})
    assert fault.startswith("reward.human_share: nothing to mix")


def test_the_same_prompt_under_another_label_keeps_its_id() -> None:
    first = pair(1)
    assert prompt_id(first.prompt) == prompt_id(dataclasses.replace(first, probability=0.6).prompt)
    assert prompt_id((Message("user", "a"),)) != prompt_id((Message("user", "b"),))


def test_micro_batches_do_not_change_the_result_though_the_last_batch_is_short(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    """11 pairs in batches of 4 end with one of 3, which micro-batches of 2 divide into 2 and 1."""
    import torch

    inputs = upstreams(tmp_path, tiny_model_dir)
    upstream(tmp_path, "compare", pairs=[pair(n, 0.9) for n in range(11)])
    for size in (1, 2, 4):
        optimizer = {"learning_rate": 1e-3, "batch_size": 4, "micro_batch_size": size}
        block = {**QUICK, "optimizer": optimizer, "epochs": 1, "held_out": 0}
        run(STAGE, block, tiny_model_dir, tmp_path / str(size), inputs)
    whole, *parts = (weights(tmp_path / f"{size}/model") for size in (4, 2, 1))
    for part in parts:
        for name in whole:
            torch.testing.assert_close(part[name], whole[name], rtol=1e-3, atol=2e-4)
    losses = [[row["loss"] for row in metrics(tmp_path / str(size))] for size in (4, 2, 1)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[2] == pytest.approx(losses[0], rel=1e-3)
