"""Batched decoding against transformers' own generate, and its invariances."""

import pytest
import torch

from align.decoding import decode as module
from align.decoding.decode import decode
from align.models.loading import load_causal_lm
from align.models.lora import add_lora
from align.settings.blocks import LoraBlock

PROMPTS = [[1, 40, 41, 42, 43, 44, 45], [1, 90], [1, 17, 18, 19], [1, 77, 78, 79, 80]]
STOPS = (1,)


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return load_causal_lm(str(tiny_model_dir), torch.float32)


def run(model, prompts=PROMPTS, **options):
    settings = {
        "seeds": list(range(len(prompts))),
        "max_new_tokens": 12,
        "temperature": 1.0,
        "stop_ids": STOPS,
        "pad_id": 1,
    }
    return decode(model, prompts, **{**settings, **options})


def generated(model, prompt, count):
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=1
    )
    return out[0, len(prompt) :].tolist()


def test_greedy_decoding_of_a_padded_batch_equals_generate_of_each_row(model):
    decoded = run(model, temperature=0.0, max_new_tokens=20)
    assert decoded.tokens == [generated(model, prompt, 20) for prompt in PROMPTS]


def test_progress_counts_finished_rows_as_done_and_others_by_their_tokens(model):
    reported = []
    decoded = run(model, temperature=2.0, stop_ids=range(60), max_new_tokens=10, progress=reported.append)
    lengths = [len(tokens) for tokens in decoded.tokens]
    ended = [reason == "stop" for reason in decoded.finish_reasons]
    assert len(set(lengths)) > 1, "the rows must end at different steps"
    expected = [
        sum(1 if stop and length <= step else step / 10 for length, stop in zip(lengths, ended, strict=True)) / 4
        for step in range(1, max(lengths) + 1)
    ]
    assert reported == pytest.approx(expected)
    assert reported[-1] == 1.0


SHARED = [[1, *range(20, 60), 90], [1, *range(20, 60), 91, 92, 93], [1, *range(60, 110), 7], [1, *range(60, 110), 8, 9]]


def test_prefixes_that_rows_share_change_no_token_and_are_prefilled_once(model, monkeypatch):
    positions = []
    forward = type(model).forward

    def counting(self, input_ids, **options):
        positions.append(input_ids.numel())
        return forward(self, input_ids=input_ids, **options)

    monkeypatch.setattr(type(model), "forward", counting)
    shared = run(model, SHARED, keep_logprobs=True)
    assert positions[:2] == [2 * 51, 4 * 3]
    alone = [run(model, [prompt], seeds=[seed], keep_logprobs=True) for seed, prompt in enumerate(SHARED)]
    assert shared.tokens == [each.tokens[0] for each in alone]
    for together, each in zip(shared.logprobs, alone, strict=True):
        assert together == pytest.approx(each.logprobs[0], abs=1e-4)


def test_rows_end_with_their_first_stop_token(model):
    free = run(model, stop_ids=(), max_new_tokens=16).tokens
    stops = (free[0][4], free[2][1])
    decoded = run(model, stop_ids=stops, max_new_tokens=16)
    for row, whole, reason in zip(decoded.tokens, free, decoded.finish_reasons, strict=True):
        ends = [position for position, token in enumerate(whole) if token in stops]
        assert row == (whole[: ends[0] + 1] if ends else whole)
        assert reason == ("stop" if ends else "length")


def test_what_a_row_samples_does_not_depend_on_the_rows_beside_it(model):
    together = run(model)
    for index, prompt in enumerate(PROMPTS):
        alone = run(model, [prompt], seeds=[index])
        assert alone.tokens[0] == together.tokens[index]


def test_dropping_finished_rows_changes_nothing(model, monkeypatch):
    free = run(model, stop_ids=(), max_new_tokens=16).tokens
    stops = tuple(row[2 + index] for index, row in enumerate(free))
    dropped = run(model, stop_ids=stops, max_new_tokens=16, keep_logprobs=True)
    monkeypatch.setattr(module, "DROP_SHARE", 2.0)
    kept = run(model, stop_ids=stops, max_new_tokens=16, keep_logprobs=True)
    assert dropped.tokens == kept.tokens
    for one, other in zip(dropped.logprobs, kept.logprobs, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_logprobs_are_those_of_a_full_forward_pass(model, temperature):
    decoded = run(model, temperature=temperature, keep_logprobs=True)
    for prompt, tokens, logprobs in zip(PROMPTS, decoded.tokens, decoded.logprobs, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        expected = (logits / (temperature or 1.0)).log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        assert logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def test_same_seeds_same_tokens_and_other_seeds_others(model):
    assert run(model).tokens == run(model).tokens
    assert run(model, seeds=[9, 8, 7, 6]).tokens != run(model).tokens


def test_a_longer_limit_continues_the_same_completion(model):
    short, long = run(model, stop_ids=(), max_new_tokens=5), run(model, stop_ids=(), max_new_tokens=9)
    assert [row[:5] for row in long.tokens] == short.tokens


def test_an_adapter_is_applied(model, tiny_model_dir):
    adapted = add_lora(load_causal_lm(str(tiny_model_dir), torch.float32), LoraBlock(r=4))
    assert run(adapted).tokens == run(model).tokens
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    assert run(adapted).tokens != run(model).tokens


def test_training_mode_is_restored_and_does_not_matter(model):
    expected = run(model).tokens
    model.train()
    model.gradient_checkpointing_enable()
    try:
        assert run(model).tokens == expected
        assert model.training and model.model.layers[0].training
    finally:
        model.gradient_checkpointing_disable()
        model.eval()


def test_works_under_autocast_and_inference_mode(model):
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(len(row) for row in run(model).tokens)


def test_no_prompts(model):
    assert run(model, []).tokens == []
    assert run(model, [], synced=True, keep_logprobs=True).logprobs == []


def test_prompts_without_seeds_or_tokens_are_refused(model):
    with pytest.raises(ValueError, match="seed"):
        run(model, PROMPTS, seeds=[1])
    with pytest.raises(ValueError, match="empty"):
        run(model, [[1], []])
