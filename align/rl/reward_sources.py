"""Rewards that are not the reward stage's: any sequence classifier, and Python functions."""

import importlib
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from align.data.chat import conversation_ids
from align.errors import AlignError, InputError, first_line
from align.models.heads import pooled_scores
from align.models.padding import right_padded
from align.models.sources import resolve_model
from align.records import Conversation, as_dicts
from align.rl.rewards import Reward
from align.settings.blocks import ModelBlock, RewardSourceBlock

UNLIMITED = 10**9
"""Tokenizers that know no limit give a number above this."""


def open_reward(
    source: RewardSourceBlock, block: ModelBlock, *, batch_size: int, dtype: torch.dtype, device: torch.device
) -> Reward:
    """The function or the classifier that a recipe names; `block` is the recipe's model.

    Raises:
        InputError: as for `load_function_reward` and `load_classifier_reward`.
    """
    if source.function is not None:
        return load_function_reward(source.function)
    assert source.model is not None, "the reward stage's model is opened by who knows its folder"
    return load_classifier_reward(
        source.model,
        revision=source.revision,
        label=source.label,
        completion_alone=source.reads == "completion",
        system_prompt=block.system_prompt,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        trust_remote_code=block.trust_remote_code,
    )


class ClassifierReward:
    """One output (a logit) of a sequence classifier of any family, which reads the text by its own tokenizer.

    With a chat template the tokenizer gets the conversation in it; without one it gets the prompt and the completion as
    a pair of texts, as cross-encoders are trained. What is longer than the model can read loses its beginning.

    Args:
        output: which of the classifier's outputs.
        completion_alone: the model is shown no prompt.
        system_prompt: put before conversations that have none, where the tokenizer has a chat template.
        batch_size: texts a pass.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        output: int,
        *,
        completion_alone: bool,
        batch_size: int,
        system_prompt: str | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.output = output
        self.completion_alone = completion_alone
        self.batch_size = batch_size
        self.system_prompt = system_prompt
        self.limit = longest_input(model, tokenizer)

    def __call__(self, prompts: Sequence[Conversation], completions: Sequence[str]) -> Tensor:
        rows = [self._encoded(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]["input_ids"]))
        result = torch.zeros(len(rows))
        for start in range(0, len(order), self.batch_size):
            group = order[start : start + self.batch_size]
            with torch.no_grad():
                logits = self._logits([rows[row] for row in group])
            result[group] = logits[:, self.output].float().cpu()
        return result

    def _encoded(self, prompt: Conversation, completion: str) -> dict[str, list[int]]:
        options = {"truncation": True, "max_length": self.limit}
        if self.completion_alone:
            return dict(self.tokenizer(completion, **options))
        if self.tokenizer.chat_template:
            opening, words = conversation_ids(self.tokenizer, prompt, completion, self.system_prompt)
            return {"input_ids": [*opening, *words][-self.limit :]}
        return dict(self.tokenizer("\n\n".join(message.content for message in prompt), completion, **options))

    def _logits(self, rows: Sequence[dict[str, list[int]]]) -> Tensor:
        """(B, outputs)."""
        device = self.model.device
        ids, mask = right_padded([row["input_ids"] for row in rows], self.tokenizer.pad_token_id, device)
        if hasattr(self.model, "score"):  # a language model's, which reads the last token that counts
            logits = pooled_scores(self.model, ids, mask)
            return logits if logits.dim() > 1 else logits[:, None]
        inputs = {"input_ids": ids, "attention_mask": mask}
        if "token_type_ids" in rows[0]:
            inputs["token_type_ids"], _ = right_padded([row["token_type_ids"] for row in rows], 0, device)
        logits = self.model(**inputs).logits
        return logits


def load_classifier_reward(
    name: str,
    *,
    revision: str | None,
    label: str | None,
    completion_alone: bool,
    system_prompt: str | None,
    batch_size: int,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
) -> ClassifierReward:
    """A classifier of the hub or of a folder, frozen.

    Raises:
        InputError: it cannot be loaded, its head is untrained, or `label` names none of its outputs.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    path = resolve_model(name, revision=revision)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, truncation_side="left", **options)
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            path, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"ppo.rewards: {name} cannot be loaded as a sequence classifier ({first_line(error)})"
        ) from error
    if missing := sorted(loading["missing_keys"]):
        raise InputError(
            f"ppo.rewards: {name} is no trained sequence classifier, it lacks {missing[0]}; name one, or a reward "
            "stage's `model/`"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    output = output_index(name, model.config, label)
    model = model.eval().requires_grad_(False).to(device)
    return ClassifierReward(
        model,
        tokenizer,
        output,
        completion_alone=completion_alone,
        batch_size=batch_size,
        system_prompt=system_prompt,
    )


def output_index(name: str, config: Any, label: str | None) -> int:
    """Which output a label (a name, or a number) is; of a single output none needs to be named."""
    labels = {str(text): int(number) for number, text in config.id2label.items()}
    numbers = {str(number): number for number in labels.values()}
    if label is None and len(labels) == 1:
        return 0
    if label is None or label not in labels | numbers:
        fault = "has several outputs" if label is None else f"has no output '{label}'"
        raise InputError(f"ppo.rewards: {name} {fault}; set `label` to one of {', '.join(labels)}")
    return (labels | numbers)[label]


def longest_input(model: Any, tokenizer: Any) -> int:
    """Tokens that the model can read at once."""
    limits = [tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or UNLIMITED]
    return min(int(limit) for limit in limits if limit <= UNLIMITED) if min(limits) <= UNLIMITED else UNLIMITED


class ScoresReward:
    """Scores that come as numbers of prompts and completions, from whatever the stage composed; None for no score."""

    may_abstain = True

    def __init__(self, scores: Callable[[Sequence[Conversation], Sequence[str]], Sequence[float | None]]) -> None:
        self.scores = scores

    def __call__(self, prompts: Sequence[Conversation], completions: Sequence[str]) -> Tensor:
        given = self.scores(prompts, completions)
        return torch.tensor([math.nan if score is None else score for score in given], dtype=torch.float32)


class FunctionReward:
    """A Python function of prompts (lists of messages, each with `role` and `content`) and completions (texts).

    It gives one number a completion, higher for a better one.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name = name
        self.function = function

    def __call__(self, prompts: Sequence[Conversation], completions: Sequence[str]) -> Tensor:
        try:
            given = list(self.function([as_dicts(prompt) for prompt in prompts], list(completions)))
            scores = torch.tensor([float(score) for score in given])
        except Exception as error:  # it is the person's own code
            raise AlignError(
                f"ppo.rewards: {self.name} failed ({type(error).__name__}: {error}); it takes (prompts, completions) "
                "and gives one number a completion"
            ) from error
        if len(scores) != len(completions):
            raise AlignError(f"ppo.rewards: {self.name} gave {len(scores)} scores for {len(completions)} completions")
        return scores


def load_function_reward(name: str) -> FunctionReward:
    """The function `module:function`; modules in the working folder are found first.

    Raises:
        InputError: there is no such module, it cannot be imported, or it has no such function.
    """
    module_name, _, function_name = name.partition(":")
    here = str(Path.cwd())
    if sys.path[0] != here:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # importing runs the person's own code
        raise InputError(
            f"ppo.rewards: {name}: the module cannot be imported ({type(error).__name__}: {error}); it is looked "
            f"for in {here}, then among the installed packages"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise InputError(f"ppo.rewards: {name}: {module.__name__} has no function '{function_name}'")
    return FunctionReward(name, function)
