"""Rewards from outside the reward stage: any sequence classifier (`classifier_reward`), Python functions, the judge."""

import importlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from align.errors import AlignError, InputError
from align.records import Conversation, as_dicts
from align.rl.classifier_reward import load_classifier_reward
from align.rl.rewards import Response, Reward
from align.settings.blocks import ModelBlock, RewardSourceBlock


def open_reward(
    source: RewardSourceBlock,
    block: ModelBlock,
    *,
    policy_tokenizer: Any,
    batch_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Reward:
    """Load the function or the classifier that a recipe names; `block` is the recipe's `model` block.

    Raises:
        InputError: see `load_function_reward` and `load_classifier_reward`.
    """
    if source.function is not None:
        return load_function_reward(source.function)
    assert source.model is not None, "the caller opens the reward stage's model, since it knows the folder"
    return load_classifier_reward(
        source.model,
        revision=source.revision,
        label=source.label,
        completion_alone=source.reads == "completion",
        policy_tokenizer=policy_tokenizer,
        system_prompt=block.system_prompt,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        trust_remote_code=block.trust_remote_code,
    )


@dataclass(frozen=True)
class JudgeReward:
    """Scores that the recipe's judge gives directly. `scores` returns None where the judge abstains."""

    may_abstain: ClassVar[bool] = True
    scores: Callable[[Sequence[Conversation], Sequence[str]], Sequence[float | None]]

    def __call__(self, responses: Sequence[Response]) -> Tensor:
        given = self.scores([each.prompt for each in responses], [each.answer for each in responses])
        return torch.tensor([math.nan if score is None else score for score in given], dtype=torch.float32)


@dataclass(frozen=True)
class FunctionReward:
    """The user's function of prompts (lists of messages, each with `role` and `content`) and answers (texts).

    It returns one number per completion, higher for a better one.
    """

    name: str
    function: Callable[..., Any]

    def __call__(self, responses: Sequence[Response]) -> Tensor:
        try:
            prompts = [as_dicts(response.prompt) for response in responses]
            given = list(self.function(prompts, [response.answer for response in responses]))
            scores = torch.tensor([float(score) for score in given])
        except Exception as error:  # the user's code may raise anything
            raise AlignError(
                f"ppo.rewards: {self.name} failed ({type(error).__name__}: {error}); it must take (prompts, "
                "completions) and return one number per completion"
            ) from error
        if len(scores) != len(responses):
            raise AlignError(f"ppo.rewards: {self.name} gave {len(scores)} scores for {len(responses)} completions")
        return scores


def load_function_reward(name: str) -> FunctionReward:
    """Import the function `module:function`. Modules in the working folder take precedence.

    Raises:
        InputError: the module does not exist or cannot be imported, or it has no such function.
    """
    module_name, _, function_name = name.partition(":")
    here = str(Path.cwd())
    if sys.path[0] != here:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # importing runs the user's code
        raise InputError(
            f"ppo.rewards: {name}: the module cannot be imported ({type(error).__name__}: {error}); it is looked "
            f"up in {here}, then among the installed packages"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise InputError(f"ppo.rewards: {name}: {module.__name__} has no function '{function_name}'")
    return FunctionReward(name, function)
