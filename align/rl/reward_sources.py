"""Rewards from outside the reward stage: any sequence classifier, Python functions, and the judge."""

import importlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from torch import Tensor

from align.data.chat import conversation_ids
from align.errors import AlignError, InputError, first_line
from align.models.heads import pooled_scores
from align.models.padding import right_padded
from align.models.sources import resolve_model
from align.records import Conversation, as_dicts
from align.rl.rewards import Reward, score_by_length
from align.settings.blocks import ModelBlock, RewardSourceBlock

UNLIMITED = 10**9
"""Tokenizers without a length limit report a number above this."""


def open_reward(
    source: RewardSourceBlock, block: ModelBlock, *, batch_size: int, dtype: torch.dtype, device: torch.device
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
        system_prompt=block.system_prompt,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        trust_remote_code=block.trust_remote_code,
    )


@dataclass(frozen=True)
class ClassifierReward:
    """One output (a logit) of a sequence classifier of any family, which reads text by its own tokenizer.

    If the tokenizer has a chat template, it encodes the conversation with it; otherwise it encodes the prompt and the
    completion as a pair of texts, as in the training of cross-encoders. Inputs that are too long are cut at the start.

    Args:
        output: index of the classifier's output.
        completion_alone: the model reads the completion without its prompt.
        batch_size: texts per pass.
        system_prompt: prepended to conversations that have none, if the tokenizer has a chat template.
    """

    model: Any
    tokenizer: Any
    output: int
    completion_alone: bool
    batch_size: int
    system_prompt: str | None = None

    @property
    def limit(self) -> int:
        """The most tokens that the model can read at once."""
        positions = getattr(self.model.config, "max_position_embeddings", None) or UNLIMITED
        return min(int(self.tokenizer.model_max_length), positions, UNLIMITED)

    def __call__(self, prompts: Sequence[Conversation], completions: Sequence[str]) -> Tensor:
        rows = [self._encoded(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        lengths = [len(row["input_ids"]) for row in rows]
        return score_by_length(lambda batch: self._logits(batch)[:, self.output], rows, lengths, self.batch_size)

    def _encoded(self, prompt: Conversation, completion: str) -> dict[str, list[int]]:
        options = {"truncation": True, "max_length": self.limit}
        if self.completion_alone:
            return dict(self.tokenizer(completion, **options))
        if self.tokenizer.chat_template:
            prompt_ids, completion_ids = conversation_ids(self.tokenizer, prompt, completion, self.system_prompt)
            return {"input_ids": [*prompt_ids, *completion_ids][-self.limit :]}
        return dict(self.tokenizer("\n\n".join(message.content for message in prompt), completion, **options))

    @torch.no_grad()
    def _logits(self, rows: Sequence[dict[str, list[int]]]) -> Tensor:
        """(B, outputs)."""
        device = self.model.device
        ids, mask = right_padded([row["input_ids"] for row in rows], self.tokenizer.pad_token_id, device)
        if hasattr(self.model, "score"):  # a language model, which reads the last attended token
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
    """Load a frozen classifier from the hub or a folder.

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
            f"ppo.rewards: {name} is not a trained sequence classifier: it lacks {missing[0]}; name one that is, or a "
            "reward stage's `model/`"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    output = output_index(name, model.config, label)
    model = model.eval().requires_grad_(False).to(device)
    return ClassifierReward(model, tokenizer, output, completion_alone, batch_size, system_prompt)


def output_index(name: str, config: Any, label: str | None) -> int:
    """The index of the output with a label (a name or a number); the label may be None if there is one output."""
    labels = {str(text): int(number) for number, text in config.id2label.items()}
    numbers = {str(number): number for number in labels.values()}
    if label is None and len(labels) == 1:
        return 0
    if label is None or label not in labels | numbers:
        fault = "has several outputs" if label is None else f"has no output '{label}'"
        raise InputError(f"ppo.rewards: {name} {fault}; set `label` to one of {', '.join(labels)}")
    return (labels | numbers)[label]


@dataclass(frozen=True)
class JudgeReward:
    """Scores that the recipe's judge gives directly. `scores` returns None where the judge abstains."""

    may_abstain: ClassVar[bool] = True
    scores: Callable[[Sequence[Conversation], Sequence[str]], Sequence[float | None]]

    def __call__(self, prompts: Sequence[Conversation], completions: Sequence[str]) -> Tensor:
        given = self.scores(prompts, completions)
        return torch.tensor([math.nan if score is None else score for score in given], dtype=torch.float32)


@dataclass(frozen=True)
class FunctionReward:
    """The user's function of prompts (lists of messages, each with `role` and `content`) and completions (texts).

    It returns one number per completion, higher for a better one.
    """

    name: str
    function: Callable[..., Any]

    def __call__(self, prompts: Sequence[Conversation], completions: Sequence[str]) -> Tensor:
        try:
            given = list(self.function([as_dicts(prompt) for prompt in prompts], list(completions)))
            scores = torch.tensor([float(score) for score in given])
        except Exception as error:  # the user's code may raise anything
            raise AlignError(
                f"ppo.rewards: {self.name} failed ({type(error).__name__}: {error}); it must take (prompts, "
                "completions) and return one number per completion"
            ) from error
        if len(scores) != len(completions):
            raise AlignError(f"ppo.rewards: {self.name} gave {len(scores)} scores for {len(completions)} completions")
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
