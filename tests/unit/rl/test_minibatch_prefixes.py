"""Each model encodes the prefixes that a minibatch's prompts share once, and the gradient is the same."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from align.records import Message, Prompt
from align.rl.batches import common_prefixes, micro_batches, position_counts, with_common_prefixes
from align.rl.rollout import Completion, TokenizedPrompt
from align.settings.blocks import LoraBlock, OptimizerBlock
from tests.rl.tiny_ppo import build_trainer, settings

CPU = torch.device("cpu")
PREFIXES = [list(range(20, 60)), list(range(60, 110))]


def completions_of(prompts: Sequence[Sequence[int]]) -> list[Completion]:
    rows = []
    for number, ids in enumerate(prompts):
        row = Prompt(id=str(number), prompt=(Message("user", "x"),), split="rl")
        tokens = (7,) * (1 + number % 5)
        rows.append(Completion(TokenizedPrompt(row, tuple(ids)), tokens, "x", True, (-1.0,) * len(tokens)))
    return rows


ROWS = completions_of([[*PREFIXES[number % 2], *range(5, 6 + number % 4)] for number in range(8)])


def test_passes_of_a_minibatch_have_one_set_of_prefixes():
    batches = with_common_prefixes(ROWS, range(8), 3, 1, CPU)
    common = common_prefixes(batches)
    assert common is not None and [len(batch.rows) for batch in batches] == [3, 3, 2]
    for batch in batches:
        remaining, mask = batch.sequences.input_ids, batch.sequences.attention_mask.bool()
        for place, (row, prefix) in enumerate(
            zip(batch.rows.tolist(), batch.sequences.prefixes.of_row.tolist(), strict=True)
        ):
            ids = [*common.ids[prefix][common.mask[prefix].bool()], *remaining[place][mask[place]]]
            assert ids == [*ROWS[row].prompt.ids, *ROWS[row].tokens]
    computed, _ = position_counts(batches)
    assert computed == common.ids.numel() + sum(batch.sequences.input_ids.numel() for batch in batches)


def test_each_pass_has_its_own_prefixes_if_a_pass_has_fewer_rows_than_there_are_prefixes():
    batches = with_common_prefixes(ROWS, range(8), 1, 1, CPU)
    assert common_prefixes(batches) is None and len(batches) == 8
    assert common_prefixes(micro_batches(ROWS, range(8), 3, 1, CPU, share=True)) is None


@pytest.fixture
def fresh_accelerate():
    """Resets the state that an earlier accelerator of this process left: precision and gradient accumulation."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("arrangement", ["adapters", "head", "full"])
def test_the_gradient_through_common_prefixes_is_that_of_whole_rows(tiny_model_dir, tmp_path, arrangement):
    block = settings(
        rollout_batch=8,
        value="head" if arrangement == "head" else "adapter",
        optimizer=OptimizerBlock(learning_rate=1e-12, batch_size=8, micro_batch_size=3, max_grad_norm=1e9),
    )
    lora = None if arrangement == "full" else LoraBlock(r=4, alpha=8)
    trainer = build_trainer(tiny_model_dir, tmp_path, block, lora=lora)
    with torch.no_grad():
        for parameter in trainer.models.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn_like(parameter)
    experience = trainer.collector.collect(0, 0.1)
    experience = replace(experience, completions=ROWS, mask=_mask(ROWS, experience.mask.shape[1]))
    found = []
    for share in (False, True):
        trainer.learner.batches = replace(trainer.learner.batches, share=share)
        batches = trainer.learner.batches.cut(ROWS, range(8))
        roles = Counter[str]()
        with _counted(trainer, roles), _kept_gradients(trainer) as gradients:
            trainer.learner._optimizer_step(experience, batches, [], first=True)
        found.append(gradients)
        networks = 2 if arrangement == "adapters" else 1
        assert roles["prefixes"] == (networks if share else 0)
    assert found[0].keys() == found[1].keys() and found[0]
    assert any(gradient.abs().max() > 1e-4 for gradient in found[0].values())
    for name, gradient in found[0].items():
        apart = (found[1][name] - gradient).abs().max() / gradient.abs().max()
        assert apart < 1e-3, f"{name}: {apart}"


def _mask(rows, width):
    return torch.tensor([[place < len(row.tokens) for place in range(width)] for row in rows])


class _counted:
    """Counts the roles in which the models are called with a gradient."""

    def __init__(self, trainer, roles):
        self.trainer, self.roles = trainer, roles

    def __enter__(self):
        self.hook = self.trainer.models.register_forward_pre_hook(lambda _, given: self.roles.update([given[0]]))

    def __exit__(self, *_):
        self.hook.remove()


class _kept_gradients:
    """Records the gradients of an optimizer step."""

    def __init__(self, trainer):
        self.trainer = trainer

    def __enter__(self):
        gradients: dict[str, torch.Tensor] = {}
        step = self.trainer.updates.step

        def kept():
            named = self.trainer.models.named_parameters()
            gradients.update({name: each.grad.clone() for name, each in named if each.grad is not None})
            return step()

        self.trainer.updates.step = kept
        self.step = step
        return gradients

    def __exit__(self, *_):
        self.trainer.updates.step = self.step
