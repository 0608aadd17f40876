"""Sampling against transformers' own generate, worked distributions, and invariances."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from align.decoding import decode as module
from align.decoding.decode import ReservedLayer, decode, draw, reserved_cache
from align.decoding.shared_prefixes import SharedPrefixes, find_shared_prefixes
from align.errors import NotFinite
from align.models.loading import add_lora, load_causal_lm
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


def test_progress_counts_rows_that_ended_as_done_and_others_by_their_tokens(model):
    told = []
    decoded = run(model, temperature=2.0, stop_ids=range(60), max_new_tokens=10, progress=told.append)
    lengths = [len(tokens) for tokens in decoded.tokens]
    ended = [reason == "stop" for reason in decoded.finish_reasons]
    assert len(set(lengths)) > 1, "the test is to see rows that end at different steps"
    expected = [
        sum(1 if stop and length <= step else step / 10 for length, stop in zip(lengths, ended, strict=True)) / 4
        for step in range(1, max(lengths) + 1)
    ]
    assert told == pytest.approx(expected)
    assert told[-1] == 1.0


SHARED = [[1, *range(20, 60), 90], [1, *range(20, 60), 91, 92, 93], [1, *range(60, 110), 7], [1, *range(60, 110), 8, 9]]


def test_common_openings_are_found_by_group_and_leave_a_token_of_each_prompt():
    openings = find_shared_prefixes(SHARED)
    assert [openings.ids[group] for group in openings.of_row] == [SHARED[0][:41]] * 2 + [SHARED[2][:51]] * 2
    assert find_shared_prefixes([[1, 2, 3], [1, 2, 3]]) == SharedPrefixes([[1, 2]], [0, 0])
    assert find_shared_prefixes([[5, 6], [7, 8]]) == SharedPrefixes.none(2)
    assert find_shared_prefixes([[5, 6]]) == SharedPrefixes.none(1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=8))
def test_every_opening_begins_its_prompt_and_is_shorter(prompts):
    openings = find_shared_prefixes(prompts)
    for prompt, group in zip(prompts, openings.of_row, strict=True):
        opening = openings.ids[group]
        assert prompt[: len(opening)] == opening and len(opening) < len(prompt)


def test_openings_that_rows_share_change_no_token_and_are_read_once(model, monkeypatch):
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


def test_a_rows_draw_does_not_depend_on_the_rows_beside_it(model):
    together = run(model)
    for index, prompt in enumerate(PROMPTS):
        alone = run(model, [prompt], seeds=[index])
        assert alone.tokens[0] == together.tokens[index]


def test_dropping_ended_rows_changes_nothing(model, monkeypatch):
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


def test_a_longer_limit_goes_on_from_the_same_start(model):
    short, long = run(model, stop_ids=(), max_new_tokens=5), run(model, stop_ids=(), max_new_tokens=9)
    assert [row[:5] for row in long.tokens] == short.tokens


def test_an_adapter_takes_part(model, tiny_model_dir):
    adapted = add_lora(load_causal_lm(str(tiny_model_dir), torch.float32), LoraBlock(r=4))
    assert run(adapted).tokens == run(model).tokens
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    assert run(adapted).tokens != run(model).tokens


def test_training_mode_is_put_back_and_does_not_matter(model):
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


def test_nothing_to_do(model):
    assert run(model, []).tokens == []
    assert run(model, [], synced=True, keep_logprobs=True).logprobs == []


def test_prompts_without_seeds_or_tokens_are_refused(model):
    with pytest.raises(ValueError, match="seed"):
        run(model, PROMPTS, seeds=[1])
    with pytest.raises(ValueError, match="empty"):
        run(model, [[1], []])


def test_draws_follow_the_distribution():
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log().expand(4000, 4)
    uniforms = (np.arange(4000) + 0.5) / 4000
    tokens, logprobs = draw(logits, uniforms, 1.0, 1.0)
    assert torch.bincount(tokens, minlength=4).tolist() == [2000, 1000, 500, 500]
    assert logprobs.exp().tolist() == pytest.approx(logits.exp().gather(-1, tokens[:, None])[:, 0].tolist())


def test_temperature_sharpens_the_distribution():
    logits = torch.tensor([0.8, 0.2]).log().expand(1700, 2)
    tokens, _ = draw(logits, (np.arange(1700) + 0.5) / 1700, 0.5, 1.0)
    assert torch.bincount(tokens).tolist() == [1600, 100]  # 0.8² : 0.2² = 16 : 1


@given(
    weights=st.lists(st.floats(0.01, 1.0), min_size=2, max_size=12),
    top_p=st.floats(0.05, 0.99),
    uniform=st.floats(0, 1, exclude_max=True),
)
@settings(max_examples=150, deadline=None)
def test_nucleus_is_the_smallest_set_with_the_mass(weights, top_p, uniform):
    probabilities = torch.tensor(weights) / sum(weights)
    tokens, _ = draw(probabilities.log()[None], np.array([uniform]), 1.0, top_p)
    token = int(tokens[0])
    likelier = float(sum(p for p in probabilities if p > probabilities[token]))
    assert likelier < top_p + 1e-5


def test_nucleus_wider_than_the_candidates_sorts_everything(monkeypatch):
    monkeypatch.setattr(module, "NUCLEUS_CANDIDATES", 2)
    logits = torch.zeros(1000, 10)
    tokens, _ = draw(logits, (np.arange(1000) + 0.5) / 1000, 1.0, 0.75)
    assert sorted(torch.bincount(tokens, minlength=10).tolist()) == [0, 0] + [125] * 8


@pytest.mark.parametrize("uniform", [0.0, np.nextafter(1.0, 0.0)])
def test_a_token_without_probability_is_never_drawn(uniform):
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    tokens, _ = draw(logits, np.array([uniform]), 1.0, 1.0)
    assert tokens.item() == (1 if uniform == 0.0 else 2)


def test_logits_that_are_not_numbers_stop_the_run():
    with pytest.raises(NotFinite, match="not finite"):
        draw(torch.tensor([[0.0, torch.nan]]), np.array([0.5]), 1.0, 1.0)


def test_cache_writes_in_place(model):
    cache = reserved_cache(model.config, 10)
    assert all(isinstance(layer, ReservedLayer) for layer in cache.layers)
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]), past_key_values=cache, use_cache=True)
        place = cache.layers[0].keys.data_ptr()
        model(torch.tensor([[4]]), past_key_values=cache, use_cache=True)
    assert cache.layers[0].keys.data_ptr() == place
    assert cache.get_seq_length() == 4
