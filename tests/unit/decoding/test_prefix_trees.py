"""Continuations scored as a tree of shared prefixes against a forward pass of each alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from align.decoding.prefix_trees import Continuation, build_tree, can_score_trees, tree_batches, tree_logprobs
from align.models.loading import load_causal_lm
from tests.tiny import build_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    build_tiny_model(folder, tie_word_embeddings=False, initializer_range=0.3)
    return load_causal_lm(str(folder), torch.float32)


def alone(model, each):
    """The continuation's log-probability from a plain causal pass over its own tokens."""
    with torch.no_grad():
        logits = model(torch.tensor([each.tokens])).logits[0, len(each.prefix) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(each.ids)[:, None]).sum().item()


rows = st.lists(st.integers(3, 5), min_size=1, max_size=5)
continuations = st.lists(st.builds(Continuation, rows, rows), min_size=1, max_size=12)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@given(asked=continuations, max_nodes=st.integers(1, 40))
@settings(deadline=None, max_examples=40)
def test_shared_prefixes_change_no_log_probability(model, attention, asked, max_nodes):
    model.set_attn_implementation(attention)
    assert can_score_trees(model)
    found = {}
    for batch in tree_batches(asked, max_nodes):
        found |= zip(batch, tree_logprobs(model, [asked[index] for index in batch]), strict=True)
    assert [found[index] for index in range(len(asked))] == pytest.approx([alone(model, each) for each in asked], 1e-4)


@given(asked=continuations, max_nodes=st.integers(1, 40))
def test_batches_contain_each_continuation_once_and_every_prefix_once(asked, max_nodes):
    batches = list(tree_batches(asked, max_nodes))
    assert sorted(index for batch in batches for index in batch) == list(range(len(asked)))
    for batch in batches:
        paths = [asked[index].tokens for index in batch]
        size = len(build_tree(paths).tokens)
        assert size == len({path[:length] for path in paths for length in range(1, len(path) + 1)})
        assert size <= max_nodes or len(batch) == 1


def test_a_node_attends_to_itself_and_its_ancestors():
    tree = build_tree([(7, 8), (7, 8, 9), (7, 9), (8,)])
    assert tree.tokens == [7, 8, 9, 9, 8]
    assert tree.depths == [0, 1, 2, 1, 0]
    assert tree.attention_mask().int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 0, 0, 1, 0],
        [0, 0, 0, 0, 1],
    ]
