"""Supervised fine-tuning on hand-made revisions and helpful demonstrations."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from align.data.sources import Intake
from align.errors import InputError
from align.records import read_jsonl
from align.stages.sft import STAGE, SftBlock, gather
from tests.stages.training import SMALL_LORA, asked, context, revision, run, same, sample, upstream, weights

QUICK = {
    "optimizer": {"learning_rate": 1e-2, "batch_size": 4, "micro_batch_size": 2},
    "epochs": 3,
    "helpful": {"harmless": ["benign"]},
}


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    return {
        "sample": upstream(
            tmp_path,
            "sample",
            samples=[
                *(sample(n) for n in range(20)),
                sample(20, finish_reason="length"),
                sample(21, split="rl"),
                sample(22, category="weapons"),
            ],
            prompts=[*(asked(n) for n in range(22)), asked(22, "weapons", "harmful.jsonl")],
        ),
        "revise": upstream(
            tmp_path,
            "revise",
            revisions=[
                *(revision(n) for n in range(12)),
                revision(30, split="preference"),
                revision(12, accepted=False),
            ],
        ),
    }


def settings(**changes: Any) -> dict[str, Any]:
    return {**QUICK, **changes}


@pytest.mark.parametrize("lora", [None, SMALL_LORA], ids=["full", "lora"])
def test_loss_falls_and_the_model_opens_with_plain_transformers(
    tmp_path: Path, tiny_model_dir: Path, inputs: dict[str, Path], lora: dict[str, Any] | None
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    outcome = run(STAGE, settings(), tiny_model_dir, tmp_path / "out", inputs, lora=lora)
    rows = list(read_jsonl(tmp_path / "out/metrics.jsonl"))
    assert [row["step"] for row in rows] == list(range(1, outcome.counts["steps"] + 1))
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3
    assert outcome.counts["revisions"] == 12
    assert outcome.counts["helpful"] == 4
    assert outcome.counts["steps"] == 12

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out/model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out/model")
    assert tokenizer.chat_template
    before = AutoModelForCausalLM.from_pretrained(tiny_model_dir).state_dict()
    assert any(not value.equal(before[name]) for name, value in model.state_dict().items())
    assert (tmp_path / "out/adapter").exists() == (lora is not None)


def test_the_adapter_on_the_base_model_is_the_merged_model(
    tmp_path: Path, tiny_model_dir: Path, inputs: dict[str, Path]
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run(STAGE, settings(), tiny_model_dir, tmp_path / "out", inputs, lora=SMALL_LORA)
    ids = torch.tensor([[5, 9, 14, 20, 3]])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out/model")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), tmp_path / "out/adapter")
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-5)


def test_the_mix_has_the_share_of_helpful_rows_and_only_harmless_finished_ones(
    tmp_path: Path, tiny_model_dir: Path, inputs: dict[str, Path]
) -> None:
    counts: Counter[str] = Counter()
    block = {"helpful": {"share": 0.4, "harmless": ["benign"]}}
    rows = gather(context(STAGE, block, tiny_model_dir, tmp_path / "out", inputs), Intake(counts))
    assert [row.source for row in rows] == ["revision"] * 12 + ["own"] * 8
    assert counts["helpful_available"] == 8
    assert {row.id for row in rows[12:]} == {f"sample-{n}" for n in range(12, 20)}
    assert rows == gather(context(STAGE, block, tiny_model_dir, tmp_path / "out", inputs), Intake())


@pytest.mark.parametrize(
    ("harmless", "available"), [([], 0), (["benign"], 8), (["harmful.jsonl"], 1), (["weapons", "benign.jsonl"], 9)]
)
def test_own_samples_are_of_the_categories_and_files_named(
    tmp_path: Path, tiny_model_dir: Path, inputs: dict[str, Path], harmless: list[str], available: int
) -> None:
    counts: Counter[str] = Counter()
    block = {"helpful": {"harmless": harmless, "share": 0.05}}
    gather(context(STAGE, block, tiny_model_dir, tmp_path / "out", inputs), Intake(counts))
    assert counts["helpful_available"] == available
    assert counts["helpful_wanted"] == 1
    assert counts["helpful"] == min(1, available)


def test_a_name_that_no_prompt_goes_by_is_an_error(
    tmp_path: Path, tiny_model_dir: Path, inputs: dict[str, Path]
) -> None:
    block = {"helpful": {"harmless": ["benin"]}}
    with pytest.raises(InputError, match=r"'benin' in .*; choose from benign, benign.jsonl, harmful.jsonl, weapons"):
        gather(context(STAGE, block, tiny_model_dir, tmp_path / "out", inputs), Intake())


def test_without_revisions_it_trains_on_every_row_of_the_sources(tmp_path: Path, tiny_model_dir: Path) -> None:
    source = tmp_path / "helpful.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"p{n}", "completion": "yes"}) + "\n" for n in range(8)))
    block = settings(revisions=False, helpful={"sources": [{"path": str(source)}]}, epochs=1)
    assert STAGE.inputs(SftBlock.model_validate(block)) == ()
    assert STAGE.files(SftBlock.model_validate(block)) == (str(source),)
    outcome = run(STAGE, block, tiny_model_dir, tmp_path / "out")
    assert outcome.counts["demonstrations"] == 8
    assert outcome.counts["steps"] == 2


def test_rows_that_are_too_long_are_left_out_and_named(
    tmp_path: Path, tiny_model_dir: Path, inputs: dict[str, Path]
) -> None:
    upstream(tmp_path, "revise", revisions=[revision(0), revision(1), revision(2, completion="long " * 300)])
    block = settings(max_length=200, helpful={"share": 0}, epochs=1)
    outcome = run(STAGE, block, tiny_model_dir, tmp_path / "out", inputs)
    assert outcome.counts["demonstrations"] == 2
    assert outcome.counts["demonstrations_too_long"] == 1
    assert outcome.figures["too_long"] == ["revision-2"]


def test_no_accepted_revision_is_an_error(tmp_path: Path, tiny_model_dir: Path, inputs: dict[str, Path]) -> None:
    upstream(tmp_path, "revise", revisions=[revision(0, accepted=False)])
    with pytest.raises(InputError, match="no accepted revision to train on"):
        run(STAGE, settings(), tiny_model_dir, tmp_path / "out", inputs)


@pytest.mark.parametrize(
    ("block", "told"),
    [
        ({"revisions": False}, "sources: with `revisions: false`"),
        ({"revisions": False, "helpful": {"share": 0.5, "sources": [{"path": "x"}]}}, "share: has no effect"),
        ({"helpful": {"own_samples": False, "share": 0.5}}, "share: there are no helpful demonstrations"),
        ({}, "harmless: names no prompts, and the base model"),
        ({"helpful": {"sources": [{"path": "x"}]}}, "harmless: names no prompts, and the base model"),
    ],
)
def test_settings_that_contradict_or_leave_the_harmless_unnamed_are_faults(block: dict[str, Any], told: str) -> None:
    (fault,) = STAGE.check(SftBlock.model_validate(block), {})
    assert told in fault


@pytest.mark.parametrize("lora", [None, SMALL_LORA], ids=["full", "lora"])
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(
    tmp_path: Path, tiny_model_dir: Path, inputs: dict[str, Path], lora: dict[str, Any] | None
) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(STAGE, settings(epochs=1), tiny_model_dir, tmp_path / name, inputs, lora=lora, seed=seed)
    a, b, c = (weights(tmp_path / name / "model") for name in "abc")
    assert same(a, b)
    assert not same(a, c)


def test_micro_batches_do_not_change_the_result(tmp_path: Path, tiny_model_dir: Path, inputs: dict[str, Path]) -> None:
    import torch

    for size in (1, 4):
        optimizer = {"learning_rate": 1e-3, "batch_size": 4, "micro_batch_size": size}
        run(STAGE, settings(optimizer=optimizer, epochs=1), tiny_model_dir, tmp_path / str(size), inputs)
    first, second = weights(tmp_path / "1/model"), weights(tmp_path / "4/model")
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("lora", [None, SMALL_LORA], ids=["full", "lora"])
def test_the_first_loss_is_the_cross_entropy_of_the_completions_tokens_alone(
    tmp_path: Path, tiny_model_dir: Path, inputs: dict[str, Path], lora: dict[str, Any] | None
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from align.data.token_columns import demonstration_columns
    from align.models.loading import load_tokenizer

    block = settings(optimizer={"batch_size": 12, "micro_batch_size": 3}, helpful={"share": 0}, epochs=1)
    made = context(STAGE, block, tiny_model_dir, tmp_path / "out", inputs, lora=lora)
    rows = demonstration_columns(load_tokenizer(str(tiny_model_dir)), gather(made, Intake()), 1000).rows
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    total, tokens = 0.0, 0
    for row in rows:
        with torch.no_grad():
            logprobs = model(torch.tensor([row["input_ids"]])).logits[0].double().log_softmax(-1)
        counted = [(n, token) for n, token in enumerate(row["labels"]) if token != -100]
        total -= sum(float(logprobs[n - 1, token]) for n, token in counted)
        tokens += len(counted)
    STAGE.run(made)
    (logged,) = read_jsonl(tmp_path / "out/metrics.jsonl")
    assert logged["loss"] == pytest.approx(total / tokens, rel=1e-4)
