"""Scores are pooled by the attention mask, and the value head is initialised and computed as documented."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from align.models.heads import ValueHead, last_attended, pooled_scores
from align.models.loading import load_causal_lm
from align.models.lora import add_lora
from align.settings.blocks import LoraBlock

ROWS = [[1, 40, 41, 42, 2], [1, 90, 2], [1, 17, 18, 19, 20, 21, 2, 2]]


@pytest.fixture
def scorer(tiny_reward_dir):
    model = AutoModelForSequenceClassification.from_pretrained(str(tiny_reward_dir), dtype=torch.float32)
    return model.eval()


def batch(side, pad_id, width=10):
    ids, mask = torch.full((len(ROWS), width), pad_id), torch.zeros(len(ROWS), width, dtype=torch.long)
    for index, row in enumerate(ROWS):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[index, place] = torch.tensor(row)
        mask[index, place] = 1
    return ids, mask


def alone(model, row):
    """The score at the row's last position, from the backbone and the head's weight by hand."""
    with torch.no_grad():
        return (model.model(torch.tensor([row])).last_hidden_state[0, -1] @ model.score.weight[0]).item()


@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_are_read_at_the_last_attended_token_even_where_it_is_the_pad_token(scorer, side):
    ids, mask = batch(side, pad_id=2)
    with torch.no_grad():
        scores = pooled_scores(scorer, ids, mask)
    assert scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx([alone(scorer, row) for row in ROWS], abs=1e-5)


def test_bf16_model_gives_scores_finer_than_bf16(scorer):
    ids, mask = batch("right", pad_id=2)
    with torch.no_grad():
        scores = pooled_scores(scorer.bfloat16(), ids, mask)
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())


def test_an_adapter_and_its_head_are_applied_and_get_gradients(scorer):
    ids, mask = batch("right", pad_id=2)
    with torch.no_grad():
        before = pooled_scores(scorer, ids, mask)
    adapted = add_lora(scorer, LoraBlock(r=4), task_type="SEQ_CLS")
    scores = pooled_scores(adapted, ids, mask)
    torch.testing.assert_close(scores.detach(), before)
    scores.sum().backward()
    named = dict(adapted.named_parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for name, p in named.items() if "lora_B" in name)
    [head] = [p for name, p in named.items() if "score.modules_to_save" in name]
    assert head.grad.abs().sum() > 0


def test_a_causal_lm_has_no_score(tiny_model_dir):
    model = load_causal_lm(str(tiny_model_dir), torch.float32)
    with pytest.raises(ValueError, match="classification head"):
        pooled_scores(model, torch.ones(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.long))


def test_last_attended_takes_the_last_set_position():
    hidden = torch.arange(8.0).reshape(2, 4, 1)
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]])
    assert last_attended(hidden, mask).tolist() == [[2.0], [7.0]]


def test_value_head_starts_small_and_without_bias():
    torch.manual_seed(0)
    head = ValueHead(4095)
    assert head.weight.std().item() == pytest.approx(1 / 64, rel=0.05)
    assert head.bias.tolist() == [0.0]


def test_value_head_computes_in_float32_under_autocast():
    head = ValueHead(8)
    hidden = torch.randn(2, 3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = head(hidden.bfloat16())
    assert values.dtype == torch.float32 and values.shape == (2, 3)
    expected = hidden.bfloat16().float() @ head.weight[0] + head.bias
    torch.testing.assert_close(values, expected)
