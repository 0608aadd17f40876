"""Policy, value, reference and reward on one trunk: each role is what it would be alone; the trunk never changes."""

import copy

import pytest
import torch

from align.config import LoraBlock
from align.errors import InputError
from align.models.policy import load_causal_lm
from align.models.ppo_loading import RewardFolder, load_shared_trunk
from align.models.ppo_models import Sequences


def sequences() -> Sequences:
    ids = torch.tensor([[3, 5, 6, 7, 8, 9], [1, 20, 21, 22, 23, 1]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0]])
    return Sequences(ids, mask, torch.tensor([[True, True, True], [True, True, False]]))


@pytest.fixture
def trunk(tiny_model_dir, tmp_path):
    torch.manual_seed(0)
    reward = RewardFolder(tmp_path, on_policy_trunk=False, mean=0.0, std=1.0)
    models = load_shared_trunk(
        str(tiny_model_dir), reward, LoraBlock(r=4), value="adapter", dtype=torch.float32, temperature=0.7
    )
    for name, parameter in models.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return models


def base_weights(models):
    return {name: parameter for name, parameter in models.named_parameters() if "lora_" not in name}


def test_the_reference_is_the_model_without_adapters(trunk, tiny_model_dir):
    batch = sequences()
    alone = load_causal_lm(str(tiny_model_dir), torch.float32)
    with torch.no_grad():
        logits = alone(input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids)
        expected = (logits.logits[:, 2:5] / 0.7).log_softmax(-1).gather(-1, batch.targets[..., None])[..., 0]
        reference = trunk("reference", sequences=batch).result
        policy = trunk("train", sequences=batch).logprobs
    assert torch.allclose(reference, expected * batch.completion_mask, atol=1e-5)
    assert not torch.allclose(policy, reference, atol=1e-3)


def test_only_the_policys_and_the_values_own_weights_train(trunk):
    trained = {name for name, parameter in trunk.named_parameters() if parameter.requires_grad}
    assert all(".policy." in name or ".value." in name or name.startswith("value_head") for name in trained)
    out = trunk("train", sequences=sequences())
    (out.logprobs.sum() + out.values.sum()).backward()
    assert all(parameter.grad is not None for name, parameter in trunk.named_parameters() if name in trained)


def test_a_thousand_merges_leave_the_trunk_bitwise_the_same(trunk):
    before = {name: weight.detach().clone() for name, weight in base_weights(trunk).items()}
    for _ in range(1000):
        with trunk.generation():
            pass
    assert all(torch.equal(before[name], weight) for name, weight in base_weights(trunk).items())


def test_the_merged_policy_is_the_policy(trunk):
    ids = torch.tensor([[3, 5, 6, 7]])
    with torch.no_grad():
        beside = trunk("generate", input_ids=ids).logits
        with trunk.generation():
            merged = trunk("generate", input_ids=ids).logits
    assert torch.allclose(beside, merged, atol=1e-4)
    assert not torch.equal(beside, merged), "the merge did something"


def test_the_trunk_is_put_back_even_when_sampling_fails(trunk):
    before = copy.deepcopy({name: weight.detach() for name, weight in base_weights(trunk).items()})
    with pytest.raises(RuntimeError), trunk.generation():
        raise RuntimeError
    assert all(torch.equal(before[name], weight) for name, weight in base_weights(trunk).items())


def test_models_that_scale_their_logits_are_refused(tiny_model_dir, tmp_path, monkeypatch):
    from align.models import ppo_loading

    def capped(*arguments, **options):
        model = load_causal_lm(*arguments, **options)
        model.config.final_logit_softcapping = 30.0
        return model

    monkeypatch.setattr(ppo_loading, "load_causal_lm", capped)
    reward = RewardFolder(tmp_path, on_policy_trunk=False, mean=0.0, std=1.0)
    with pytest.raises(InputError, match="final_logit_softcapping"):
        load_shared_trunk(str(tiny_model_dir), reward, LoraBlock(), value=None, dtype=torch.float32, temperature=1.0)
