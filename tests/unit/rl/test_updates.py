"""Optimizer steps: Adam's epsilon, and the policy's steps beside a value that is far off."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from align.rl.loading import load_models
from align.rl.updates import Updates, adamw
from align.settings.blocks import LoraBlock, OptimizerBlock


class TwoNetworks(nn.Module):
    """Ten weights of a policy and ten of a value, each with a loss that is linear in its weights."""

    adam_epsilon = 1e-8

    def __init__(self) -> None:
        super().__init__()
        self.policy, self.value = nn.Parameter(torch.zeros(10)), nn.Parameter(torch.zeros(10))

    def gradient_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"policy_gradient_norm": [self.policy], "value_gradient_norm": [self.value]}

    def forward(self, error: float) -> torch.Tensor:
        return 0.1 * self.policy.sum() + error * self.value.sum()


def policy_after(errors: list[float]) -> tuple[torch.Tensor, dict[str, float]]:
    """The policy's weights after a step beside each error of the value, and the last step's norms."""
    updates = Updates(Accelerator(cpu=True), TwoNetworks(), OptimizerBlock(learning_rate=1e-2, max_grad_norm=1.0))
    for error in errors:
        updates.backward(updates.wrapped(error))
        norms = updates.step()
    return updates.models.policy.detach(), norms


def test_the_policys_steps_do_not_depend_on_how_far_off_the_value_is() -> None:
    """Under one clip over both, a value that is thrown off halfway would halve the policy's steps for a while."""
    steady, _ = policy_after([0.1] * 20)
    thrown_off, norms = policy_after([0.1] * 10 + [1000.0] * 10)
    assert torch.equal(steady, thrown_off)
    assert norms == pytest.approx(
        {"gradient_norm": (0.1**2 + 1000**2) ** 0.5 * 10**0.5, "value_gradient_norm": 1000 * 10**0.5}
    )


def test_a_value_gradient_that_is_not_finite_skips_the_whole_step() -> None:
    steady, _ = policy_after([0.1] * 3)
    skipped, norms = policy_after([0.1] * 3 + [float("inf")])
    assert torch.equal(steady, skipped)
    assert not norms["value_gradient_norm"] < float("inf")


@pytest.mark.parametrize(
    ("lora", "given", "expected"),
    [(LoraBlock(r=4), None, 1e-8), (None, None, 1e-5), (LoraBlock(r=4), 3e-7, 3e-7), (None, 3e-7, 3e-7)],
)
def test_adams_epsilon_is_the_recipes_or_fits_what_is_trained(
    tiny_model_dir: Any, lora: LoraBlock | None, given: float | None, expected: float
) -> None:
    models = load_models(tiny_model_dir, None, lora, value=None, dtype=torch.float32, temperature=1.0)
    optimizer = adamw(models, OptimizerBlock(epsilon=given))
    assert [group["eps"] for group in optimizer.param_groups] == [expected]


def test_an_epsilon_that_no_recipe_names_leaves_earlier_results_up_to_date() -> None:
    assert "epsilon" not in OptimizerBlock().model_dump(mode="json")
    assert OptimizerBlock(epsilon=1e-6).model_dump(mode="json")["epsilon"] == 1e-6
