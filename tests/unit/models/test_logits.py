"""Logits by a model's own head, found out by a forward pass instead of by the model's name."""

from typing import Any

import pytest
import torch

from align.errors import InputError
from align.models.logits import find_head, output_head
from align.models.logprobs import head_logprobs
from tests.families.tiny_families import DECODERS, Family, random_model

FAMILIES = {family.name: family for family in DECODERS}
MODERNBERT = Family(
    "ModernBERT decoder", "modernbert-decoder", {"local_attention": 8, "cls_token_id": 0, "sep_token_id": 1}
)


@pytest.mark.parametrize("name", ["Llama 3", "Llama 3.2, tied", "OPT-350m", "gpt-oss"])
def test_a_product_with_the_output_embedding_is_taken_for_one(name: str) -> None:
    assert output_head(random_model(FAMILIES[name])).is_plain


@pytest.mark.parametrize(
    "family", [*(FAMILIES[name] for name in ("Gemma 2", "Gemma 4", "Granite", "Cohere 2", "Phi-2")), MODERNBERT]
)
def test_scaled_capped_and_biased_logits_and_their_gradients_are_the_models_own(family: Family) -> None:
    model = random_model(family)
    with torch.no_grad():
        if (bias := model.get_output_embeddings().bias) is not None:
            bias.normal_()
    head = output_head(model)
    assert not head.is_plain
    ids, targets = torch.arange(2, 14)[None], torch.arange(40, 52)
    states = model.base_model(input_ids=ids).last_hidden_state[0].detach().requires_grad_()
    found = head_logprobs(head, states, targets, 0.7).logprobs
    (gradient,) = torch.autograd.grad(found.sum(), states)

    kept: list[torch.Tensor] = []
    hook = model.base_model.register_forward_hook(
        lambda _, __, output: kept.append(output.last_hidden_state) or output.last_hidden_state.retain_grad()  # type: ignore[func-returns-value]
    )
    own = (model(input_ids=ids).logits[0] / 0.7).log_softmax(-1)[range(12), targets]
    own.sum().backward()
    hook.remove()
    torch.testing.assert_close(found, own, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, kept[0].grad[0], atol=1e-4, rtol=1e-3)


def test_a_cap_that_small_logits_hardly_feel_is_found_in_bf16_too() -> None:
    small = Family("capped", "gemma2", {**FAMILIES["Gemma 2"].settings, "final_logit_softcapping": 30.0})
    assert not output_head(random_model(small).bfloat16()).is_plain


def test_logits_that_need_more_than_the_last_hidden_states_are_refused() -> None:
    model = random_model(FAMILIES["Llama 3"])

    def shift(_: object, args: object, kwargs: dict[str, torch.Tensor], output: Any) -> Any:
        output.logits = output.logits * (1 + kwargs["input_ids"][..., None])
        return output

    model.register_forward_hook(shift, with_kwargs=True)
    assert find_head(model) is None
    with pytest.raises(InputError, match=r"more than its last hidden states.*use dpo"):
        output_head(model)
