"""Policy, value, reference and reward on one trunk: each role computes what a separate model would."""

import copy

import pytest
import torch

from align.errors import InputError
from align.models.loading import load_causal_lm
from align.rl.loading import RewardFolder, load_models
from align.rl.sequences import lay_out
from align.settings.blocks import LoraBlock
from tests.tiny import build_tiny_model


def sequences():
    return lay_out([[3, 5, 6], [20, 21]], [[7, 8, 9], [22, 23]], 1, torch.device("cpu"), share=False)


@pytest.fixture
def trunk(tiny_model_dir, tmp_path):
    torch.manual_seed(0)
    reward = RewardFolder(tmp_path, on_policy_trunk=False, mean=0.0, std=1.0)
    models = load_models(
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
    trunk("train", sequences=sequences()).logprobs.sum().backward()
    trunk("values", sequences=sequences()).result.sum().backward()
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


def test_a_bf16_trunk_is_merged_and_put_back_bitwise(tiny_model_dir):
    models = load_models(str(tiny_model_dir), None, LoraBlock(r=4), value=None, dtype=torch.bfloat16, temperature=1.0)
    for name, parameter in models.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    before = {name: weight.detach().clone() for name, weight in base_weights(models).items()}
    with models.generation():
        merged = {name: weight.detach().clone() for name, weight in base_weights(models).items()}
    adapted = [name for name in before if not torch.equal(before[name], merged[name])]
    assert len(adapted) == 14, "seven linear layers in each of two blocks"
    assert all(torch.equal(before[name], weight) for name, weight in base_weights(models).items())


def test_the_trunk_is_put_back_even_when_sampling_fails(trunk):
    before = copy.deepcopy({name: weight.detach() for name, weight in base_weights(trunk).items()})
    with pytest.raises(RuntimeError), trunk.generation():
        raise RuntimeError
    assert all(torch.equal(before[name], weight) for name, weight in base_weights(trunk).items())


def test_an_adapter_on_the_output_layer_is_refused(tmp_path):
    model_dir = build_tiny_model(tmp_path / "untied", tie_word_embeddings=False)
    lora = LoraBlock(target_modules=("q_proj", "lm_head"))
    with pytest.raises(InputError, match=r"model.lora.target_modules: .*output layer \(lm_head\); leave it out"):
        load_models(str(model_dir), None, lora, value=None, dtype=torch.float32, temperature=1.0)


def test_gradients_are_clipped_apart_for_what_only_the_value_loss_trains(trunk, tiny_model_dir):
    def names(models):
        named = {id(parameter): name for name, parameter in models.named_parameters()}
        return {key: {named[id(each)] for each in group} for key, group in models.gradient_groups().items()}

    groups = names(trunk)
    assert all(".policy." in name for name in groups["policy_gradient_norm"])
    assert all(".value." in name or name.startswith("value_head") for name in groups["value_gradient_norm"])
    options = {"value": "adapter", "dtype": torch.float32, "temperature": 1.0}
    groups = names(load_models(str(tiny_model_dir), None, None, **options))
    assert all(name.startswith("policy.") for name in groups["policy_gradient_norm"])
    assert all(name.startswith("value_") for name in groups["value_gradient_norm"])
    assert list(names(load_models(str(tiny_model_dir), None, None, **options | {"value": None}))) == [
        "policy_gradient_norm"
    ]


def rows_with_a_common_prefix():
    """Prompts that begin with one of two system prompts, of 40 and 50 tokens."""
    prefixes = [list(range(20, 60)), list(range(60, 110))]
    prompts = [[*prefix, *range(5, 5 + length)] for prefix in prefixes for length in (1, 4, 2)]
    return prompts, [[7] * length for length in (3, 1, 5, 2, 4, 4)]


def gradients(models):
    found = {name: parameter.grad.clone() for name, parameter in models.named_parameters() if parameter.requires_grad}
    models.zero_grad()
    return found


def test_rows_that_share_a_prefix_give_the_same_outputs_and_gradients_as_alone(trunk):
    prompts, completions = rows_with_a_common_prefix()
    passes, slopes = [], []
    for share in (False, True):
        batch = lay_out(prompts, completions, 1, torch.device("cpu"), share=share)
        logprobs, values = trunk("train", sequences=batch).logprobs, trunk("values", sequences=batch).result
        passes.append((logprobs, values))
        (logprobs * values.detach() + values).sum().backward()
        slopes.append(gradients(trunk))
        with torch.no_grad():
            assert torch.allclose(trunk("reference", sequences=batch).result, reference(trunk, prompts, completions))
            assert torch.allclose(trunk("values", sequences=batch).result, values, atol=1e-6)
    assert batch.input_ids.numel() == 6 * (4 + 5) and batch.prefixes.ids.shape == (2, 50)
    for alone, shared in zip(*passes, strict=True):
        assert torch.allclose(alone, shared, atol=1e-5)
    for name, slope in slopes[0].items():
        assert torch.allclose(slope, slopes[1][name], atol=1e-4, rtol=1e-3), name


def reference(models, prompts, completions):
    """(B, T) the reference's log-probs, row by row without padding."""
    width = max(map(len, completions))
    rows = []
    for prompt, completion in zip(prompts, completions, strict=True):
        batch = lay_out([prompt], [completion], 1, torch.device("cpu"), share=False)
        rows.append(
            torch.nn.functional.pad(models("reference", sequences=batch).result[0], (0, width - len(completion)))
        )
    return torch.stack(rows)
