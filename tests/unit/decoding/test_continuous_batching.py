"""Continuous batching and cached prefixes against transformers' own generate, and how many tokens they prefill."""

from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from align.decoding import continuous_batching
from align.decoding.continuous_batching import ContinuousBatcher, Task
from align.decoding.decode import decode
from align.decoding.prefix_cache import CachedPrefix, PrefixCache, common_prefix_length
from align.decoding.shared_prefix_attention import attending_to_prefix
from align.errors import NotFinite
from align.models.loading import load_causal_lm
from tests.tiny import build_tiny_model

PREFIX = [1, *range(20, 60)]
PROMPTS = [[*PREFIX, *range(100 + 7 * row, 103 + 8 * row)] for row in range(9)] + [[1, 77], [1, 90, 91, 92]]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Random weights large enough that greedy completions vary; with small ones they repeat a token."""
    folder = tmp_path_factory.mktemp("model")
    build_tiny_model(folder, tie_word_embeddings=False, initializer_range=0.3)
    return load_causal_lm(str(folder), torch.float32)


def batcher_of(model, rows=3, kept_tokens=1000, limit=12, temperature=0.0, stops=(1,)):
    return ContinuousBatcher(
        model,
        rows=rows,
        kept_tokens=kept_tokens,
        max_new_tokens=limit,
        temperature=temperature,
        top_p=1.0,
        stop_ids=stops,
        pad_id=1,
    )


def complete(batcher, prompts=PROMPTS):
    tasks = deque(Task(number, prompt, number) for number, prompt in enumerate(prompts))
    return {task.key: (tokens, reason) for task, tokens, reason in batcher.run(tasks)}


def generated(model, prompt, count, stops=(1,)):
    ids = torch.tensor([prompt])
    options = {"eos_token_id": list(stops)} if stops else {"eos_token_id": None}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, **options)
    return out[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def stops(model):
    """Stop tokens that end rows at different steps, some of them at the first."""
    free = [generated(model, prompt, 12, ()) for prompt in PROMPTS]
    return (1, free[0][3], free[4][0], free[9][6], free[6][8])


@pytest.mark.parametrize("rows", [1, 3, 4, 64])
@pytest.mark.parametrize("kept_tokens", [0, 60, 1000])
def test_greedy_rows_equal_generate_of_each_row(model, stops, rows, kept_tokens):
    done = complete(batcher_of(model, rows, kept_tokens, stops=stops))
    assert len({len(tokens) for tokens, _ in done.values()}) > 2, "the rows must end at different steps"
    for number, prompt in enumerate(PROMPTS):
        tokens, reason = done[number]
        assert tokens == generated(model, prompt, 12, stops)
        assert reason == ("stop" if tokens[-1] in stops else "length")


def test_sampled_rows_equal_those_of_one_batch(model, stops):
    done = complete(batcher_of(model, temperature=1.0, stops=stops))
    together = decode(
        model,
        PROMPTS,
        seeds=range(len(PROMPTS)),
        max_new_tokens=12,
        temperature=1.0,
        stop_ids=stops,
        pad_id=1,
    )
    assert [done[number][0] for number in range(len(PROMPTS))] == together.tokens


def test_a_prefix_that_rows_share_is_prefilled_once(model):
    prompts = PROMPTS[:9]
    batcher = batcher_of(model)
    complete(batcher, prompts)
    shared = len(PREFIX)
    assert batcher.prefilled == shared + sum(len(prompt) - shared for prompt in prompts)


@pytest.mark.parametrize(("kept_tokens", "rows"), [(1000, 2), (1000, 64), (40, 2), (0, 3)])
def test_a_next_turn_prefills_only_its_own_tokens_and_equals_generate(model, kept_tokens, rows):
    batcher = batcher_of(model, rows, kept_tokens, stops=())
    waiting = deque(Task((number, 1), prompt, 0) for number, prompt in enumerate(PROMPTS))
    done = {}
    for task, tokens, _ in batcher.run(waiting):
        done[task.key] = tokens
        number, turn = task.key
        if turn < 4:
            waiting.appendleft(Task((number, turn + 1), [*task.prompt, *tokens, 200, 201 + number], 0))
    assert len(done) == 4 * len(PROMPTS)
    for number, prompt in enumerate(PROMPTS):
        so_far = list(prompt)
        for turn in range(1, 5):
            assert done[number, turn] == generated(model, so_far, 12, ())
            so_far += [*done[number, turn], 200, 201 + number]
    if kept_tokens == 1000:
        first = len(PREFIX) + sum(len(prompt) - common_prefix_length(prompt, PREFIX) for prompt in PROMPTS)
        # A turn's last token was sampled but not yet run through the model. It is prefilled with the next turn's two.
        assert batcher.prefilled <= first + 3 * 3 * len(PROMPTS) + len(PREFIX)


@pytest.mark.parametrize("kept_tokens", [0, 60, 1000])
@pytest.mark.parametrize("rows", [2, 64])
def test_a_prefix_stored_once_changes_no_row_even_beside_rows_without_it(model, stops, rows, kept_tokens, monkeypatch):
    shared = []
    monkeypatch.setattr(
        continuous_batching, "attending_to_prefix", lambda *of: shared.append(of[2]) or attending_to_prefix(*of)
    )
    batcher = batcher_of(model, rows, kept_tokens, stops=stops)
    waiting = deque(Task((number, 1), prompt, 0) for number, prompt in enumerate(PROMPTS[:9]))
    found = {}
    for task, tokens, _ in batcher.run(waiting):
        found[task.key] = task.prompt, tokens
        number, turn = task.key
        if turn < 3:
            others = ([*task.prompt, *tokens, 200, 201 + number], [150 + number, 7, 8], list(PREFIX))
            waiting.append(Task((number, turn + 1), others[number % 3], 0))
    assert len(found) == 27
    for prompt, tokens in found.values():
        assert tokens == generated(model, prompt, 12, stops)
    assert any(rows.any() for rows in shared)
    assert any(rows.any() and not rows.all() for rows in shared)
    assert model.config._attn_implementation == "sdpa"


def test_no_tasks(model):
    assert complete(batcher_of(model), []) == {}


def test_logits_that_are_not_numbers_stop_the_run(tiny_model_dir):
    broken = load_causal_lm(str(tiny_model_dir), torch.float32)
    with torch.no_grad():
        broken.model.norm.weight.fill_(torch.nan)
    with pytest.raises(NotFinite):
        complete(batcher_of(broken))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple), max_size=12),
    st.lists(st.integers(0, 2), min_size=1, max_size=8),
    st.integers(0, 30),
)
def test_the_prefix_cache_finds_the_longest_common_prefix_and_stays_within_its_capacity(kept, prompt, capacity):
    cache, expected = PrefixCache(capacity), []
    for tokens in kept:
        cache.add(CachedPrefix(tokens, []))
        if tokens not in expected and len(tokens) <= capacity:
            expected.append(tokens)
        while sum(map(len, expected)) > capacity:
            expected.pop(0)
    longest = min(max((common_prefix_length(tokens, prompt) for tokens in expected), default=0), len(prompt) - 1)
    prefix, length = cache.longest(prompt)
    assert length == longest
    assert prefix is None if not length else list(prefix.tokens[:length]) == prompt[:length]
