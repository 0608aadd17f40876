"""Decoding in slots completes every prompt as plain decoding does, in whatever order and company rows run."""

from collections import deque

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from align.decoding.continuous_batching import Task
from align.decoding.decode import decode
from align.decoding.slot_batching import SlotBatcher, can_use_slots
from align.errors import NotFinite

VOCABULARY = 300
STOPS = list(range(5, 20))
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@pytest.fixture(scope="module", params=[(LlamaConfig, LlamaForCausalLM), (Qwen3Config, Qwen3ForCausalLM)])
def model(request):
    config, kind = request.param
    torch.manual_seed(0)
    return kind(config(**SMALL)).eval()


def prompts(count: int = 20) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 30, (count,), generator=generator).tolist()
    found = [torch.randint(20, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    found[3] = found[4]
    return found


def options(**changes):
    usual = {"max_new_tokens": 24, "temperature": 0.8, "top_p": 1.0, "stop_ids": STOPS, "pad_id": 0}
    return usual | changes


@pytest.mark.parametrize("changes", [{}, {"temperature": 1.0, "top_p": 0.7}, {"temperature": 0.0}])
def test_every_row_is_the_same_as_by_plain_decoding(model, changes) -> None:
    plain = decode(model, prompts(), seeds=range(20), keep_logprobs=True, **options(**changes))
    batcher = SlotBatcher(model, rows=7, **options(**changes))
    found = {row.task.key: row for row in batcher.run(deque(Task(i, p, i) for i, p in enumerate(prompts())))}
    assert [found[i].tokens for i in range(20)] == plain.tokens
    assert [found[i].finish_reason for i in range(20)] == plain.finish_reasons
    assert set(plain.finish_reasons) == {"stop", "length"} or changes
    for i in range(20):
        assert found[i].logprobs == pytest.approx(plain.logprobs[i], abs=1e-5)


def test_equal_prompts_are_read_once(model) -> None:
    batcher = SlotBatcher(model, rows=8, **options(max_new_tokens=2))
    list(batcher.run(deque(Task(i, [21, 22, 23, 24], i) for i in range(8))))
    assert batcher.prefilled == 3


def test_tasks_may_be_added_while_others_run_even_longer_ones(model) -> None:
    waiting = deque([Task("first", [30, 31], 0), Task("second", [32], 1)])
    batcher = SlotBatcher(model, rows=2, **options(max_new_tokens=6))
    longer = [40 + i for i in range(90)]
    found = {}
    for row in batcher.run(waiting):
        found[row.task.key] = row.tokens
        if row.task.key == "first":
            waiting.append(Task("longer", longer, 2))
    plain = decode(model, [[30, 31], [32], longer], seeds=[0, 1, 2], **options(max_new_tokens=6))
    assert [found[key] for key in ("first", "second", "longer")] == plain.tokens


def test_values_are_kept_beside_the_tokens(model) -> None:
    class WithValues:
        config, device, dtype = model.config, model.device, model.dtype

        def __call__(self, **inputs):
            given = model(**inputs)
            given.values = inputs["position_ids"].float()
            return given

    batcher = SlotBatcher(WithValues(), rows=2, keep_values=True, **options(max_new_tokens=4, stop_ids=[]))
    found = {row.task.key: row.values for row in batcher.run(deque([Task(0, [30, 31, 32], 0), Task(1, [33], 1)]))}
    assert found == {0: [2.0, 3.0, 4.0, 5.0], 1: [0.0, 1.0, 2.0, 3.0]}


def test_logits_that_are_not_numbers_end_the_run(model) -> None:
    class Broken:
        config, device, dtype = model.config, model.device, model.dtype

        def __call__(self, **inputs):
            given = model(**inputs)
            given.logits = given.logits * float("nan")
            return given

    with pytest.raises(NotFinite, match="not finite"):
        list(SlotBatcher(Broken(), rows=1, **options()).run(deque([Task(0, [30, 31], 0)])))


def test_the_models_own_attention_is_back_afterwards(model) -> None:
    before = model.config._attn_implementation
    list(SlotBatcher(model, rows=1, **options()).run(deque([Task(0, [30, 31], 0)])))
    assert model.config._attn_implementation == before


def test_a_cpu_decodes_as_ever(model) -> None:
    assert not can_use_slots(model)
