"""Continuous batching and kept prefixes against transformers' own generate, and what they read."""

from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import align.decoding.continuous_batching as running_module
from align.decoding.continuous_batching import ContinuousBatcher, Task
from align.decoding.decode import decode
from align.decoding.prefix_cache import CachedPrefix, PrefixCache, common
from align.decoding.shared_prefix_attention import after_shared_prefix
from align.errors import NotFinite
from align.models.loading import load_causal_lm
from tests.tiny import build_tiny_model

OPENING = [1, *range(20, 60)]
PROMPTS = [[*OPENING, *range(100 + 7 * row, 103 + 8 * row)] for row in range(9)] + [[1, 77], [1, 90, 91, 92]]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Random weights large enough that greedy completions wander, where the small ones repeat a token."""
    folder = tmp_path_factory.mktemp("model")
    build_tiny_model(folder, tie_word_embeddings=False, initializer_range=0.3)
    return load_causal_lm(str(folder), torch.float32)


def running(model, rows=3, kept_tokens=1000, limit=12, temperature=0.0, stops=(1,)):
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


def complete(engine, prompts=PROMPTS):
    tasks = deque(Task(number, prompt, number) for number, prompt in enumerate(prompts))
    return {task.key: (tokens, reason) for task, tokens, reason in engine.run(tasks)}


def generated(model, prompt, count, stops=(1,)):
    ids = torch.tensor([prompt])
    options = {"eos_token_id": list(stops)} if stops else {"eos_token_id": None}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, **options)
    return out[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def stops(model):
    """Tokens that end rows at different steps, some at once."""
    free = [generated(model, prompt, 12, ()) for prompt in PROMPTS]
    return (1, free[0][3], free[4][0], free[9][6], free[6][8])


@pytest.mark.parametrize("rows", [1, 3, 4, 64])
@pytest.mark.parametrize("kept_tokens", [0, 60, 1000])
def test_greedy_rows_equal_generate_of_each_row(model, stops, rows, kept_tokens):
    done = complete(running(model, rows, kept_tokens, stops=stops))
    assert len({len(tokens) for tokens, _ in done.values()}) > 2, "rows are to end at different steps"
    for number, prompt in enumerate(PROMPTS):
        tokens, reason = done[number]
        assert tokens == generated(model, prompt, 12, stops)
        assert reason == ("stop" if tokens[-1] in stops else "length")


def test_drawn_rows_equal_those_of_one_batch(model, stops):
    done = complete(running(model, temperature=1.0, stops=stops))
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


def test_an_opening_that_rows_share_is_read_once(model):
    prompts = PROMPTS[:9]
    engine = running(model)
    complete(engine, prompts)
    shared = len(OPENING)
    assert engine.read == shared + sum(len(prompt) - shared for prompt in prompts)


@pytest.mark.parametrize(("kept_tokens", "rows"), [(1000, 2), (1000, 64), (40, 2), (0, 3)])
def test_a_next_turn_reads_its_own_tokens_alone_and_equals_generate(model, kept_tokens, rows):
    engine = running(model, rows, kept_tokens, stops=())
    waiting = deque(Task((number, 1), prompt, 0) for number, prompt in enumerate(PROMPTS))
    done = {}
    for task, tokens, _ in engine.run(waiting):
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
        first = len(OPENING) + sum(len(prompt) - common(prompt, OPENING) for prompt in PROMPTS)
        # A turn's last token was drawn and not yet read; with it come the two of the next.
        assert engine.read <= first + 3 * 3 * len(PROMPTS) + len(OPENING)


@pytest.mark.parametrize("kept_tokens", [0, 60, 1000])
@pytest.mark.parametrize("rows", [2, 64])
def test_an_opening_kept_once_changes_no_row_also_beside_rows_without_it(model, stops, rows, kept_tokens, monkeypatch):
    shared = []
    monkeypatch.setattr(
        running_module, "after_shared_prefix", lambda *of: shared.append(of[2]) or after_shared_prefix(*of)
    )
    engine = running(model, rows, kept_tokens, stops=stops)
    waiting = deque(Task((number, 1), prompt, 0) for number, prompt in enumerate(PROMPTS[:9]))
    found = {}
    for task, tokens, _ in engine.run(waiting):
        found[task.key] = task.prompt, tokens
        number, turn = task.key
        if turn < 3:
            others = ([*task.prompt, *tokens, 200, 201 + number], [150 + number, 7, 8], list(OPENING))
            waiting.append(Task((number, turn + 1), others[number % 3], 0))
    assert len(found) == 27
    for prompt, tokens in found.values():
        assert tokens == generated(model, prompt, 12, stops)
    assert any(rows.any() for rows in shared)
    assert any(rows.any() and not rows.all() for rows in shared)
    assert model.config._attn_implementation == "sdpa"


def test_nothing_waits(model):
    assert complete(running(model), []) == {}


def test_logits_that_are_not_numbers_stop_the_run(tiny_model_dir):
    broken = load_causal_lm(str(tiny_model_dir), torch.float32)
    with torch.no_grad():
        broken.model.norm.weight.fill_(torch.nan)
    with pytest.raises(NotFinite):
        complete(running(broken))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple), max_size=12),
    st.lists(st.integers(0, 2), min_size=1, max_size=8),
    st.integers(0, 30),
)
def test_the_store_finds_the_longest_common_beginning_and_stays_within_its_capacity(kept, prompt, capacity):
    store, expected = PrefixCache(capacity), []
    for tokens in kept:
        store.add(CachedPrefix(tokens, []))
        if tokens not in expected and len(tokens) <= capacity:
            expected.append(tokens)
        while sum(map(len, expected)) > capacity:
            expected.pop(0)
    longest = min(max((common(tokens, prompt) for tokens in expected), default=0), len(prompt) - 1)
    prefix, length = store.longest(prompt)
    assert length == longest
    assert prefix is None if not length else list(prefix.tokens[:length]) == prompt[:length]
