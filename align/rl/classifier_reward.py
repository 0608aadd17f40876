"""A reward that any sequence classifier gives: a reward model of another family, or a classifier of texts."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from align.data.chat import closing_ids, prompt_ids, same_tokens, token_ids, whole_ids
from align.errors import InputError, first_line
from align.models.heads import pooled_scores
from align.models.padding import right_padded
from align.models.sources import resolve_model
from align.rl.rewards import Response, nan_as_infinity, score_by_length

UNLIMITED = 10**9
"""Tokenizers without a length limit report a number above this."""


@dataclass(frozen=True)
class ClassifierReward:
    """One output (a logit) of a sequence classifier of any family.

    A classifier whose tokenizer has no chat template reads the prompt and the answer as a pair of texts, as in the
    training of cross-encoders. One with a chat template reads a conversation up to the last token that the template
    writes, where its authors read its score. If it has the policy's own tokenizer, it reads the policy's own tokens.
    Without them, an answer that the template cannot render is not scored.

    Where a conversation is too long, the prompt loses its beginning. If the answer alone is too long, it loses its end.

    Args:
        output: index of the classifier's output.
        completion_alone: the model reads the answer without its prompt.
        batch_size: texts per pass.
        own_tokens: the policy has the same tokenizer.
        system_prompt: prepended to conversations that have none, if the tokenizer has a chat template.
        counts: under `cut`, the conversations that were too long.
    """

    may_abstain: ClassVar[bool] = True
    model: Any
    tokenizer: Any
    output: int
    completion_alone: bool
    batch_size: int
    own_tokens: bool = False
    system_prompt: str | None = None
    counts: Counter[str] = field(default_factory=Counter)

    @cached_property
    def limit(self) -> int:
        """The most tokens that the model can read at once."""
        return min(int(self.tokenizer.model_max_length), positions(self.model), UNLIMITED)

    def take_cut(self) -> int:
        """How many conversations were too long since the last call."""
        return self.counts.pop("cut", 0)

    def __call__(self, responses: Sequence[Response]) -> Tensor:
        encoded = [self._encoded(response) for response in responses]
        readable = [row for row, each in enumerate(encoded) if each is not None]
        rows = [each for each in encoded if each is not None]
        lengths = [len(row["input_ids"]) for row in rows]
        scores = torch.full((len(responses),), torch.nan)
        found = score_by_length(lambda batch: self._logits(batch)[:, self.output], rows, lengths, self.batch_size)
        scores[readable] = nan_as_infinity(found)
        return scores

    def _encoded(self, response: Response) -> dict[str, list[int]] | None:
        """The model's inputs; None if the chat template cannot render the conversation."""
        if self.completion_alone:
            return self._texts(response.answer)
        if not self.tokenizer.chat_template:
            return self._texts("\n\n".join(message.content for message in response.prompt), response.answer)
        try:
            return {"input_ids": self._conversation(response)}
        except InputError:
            return None

    def _conversation(self, response: Response) -> list[int]:
        if self.own_tokens and response.token_ids:
            opening = response.prompt_ids or prompt_ids(self.tokenizer, response.prompt, self.system_prompt)
            ending = closing_ids(self.tokenizer) if response.finished else ()
            return self._fitted([*opening, *response.token_ids, *ending], len(response.token_ids) + len(ending))
        ids = whole_ids(
            self.tokenizer, response.prompt, response.answer, self.system_prompt, finished=response.finished
        )
        if len(ids) <= self.limit:
            return ids
        opening = prompt_ids(self.tokenizer, response.prompt, self.system_prompt)
        return self._fitted(ids, max(len(ids) - len(opening), 1))

    def _fitted(self, ids: list[int], answer_length: int) -> list[int]:
        """The ids without the prompt's beginning or, if the answer alone is too long, the answer's beginning."""
        if len(ids) <= self.limit:
            return ids
        self.counts["cut"] += 1
        return ids[-max(answer_length, self.limit) :][: self.limit]

    def _texts(self, *texts: str) -> dict[str, list[int]]:
        """The inputs for an answer, or for a prompt and an answer."""
        *before, answer = texts
        special = self.tokenizer.num_special_tokens_to_add(pair=bool(before))
        room = self.limit - special - len(token_ids(self.tokenizer, answer))
        needed = sum(len(token_ids(self.tokenizer, text)) for text in before)
        if room >= needed:
            return dict(self.tokenizer(*texts))
        self.counts["cut"] += 1
        if room > 0:  # of the prompt, at least its last token stays
            return dict(self.tokenizer(*texts, truncation="only_first", max_length=self.limit))
        self.tokenizer.truncation_side = "right"
        cut = "only_second" if before else "only_first"
        encoded = dict(self.tokenizer(*("" for _ in before), answer, truncation=cut, max_length=self.limit))
        self.tokenizer.truncation_side = "left"
        return encoded

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


def positions(model: Any) -> int:
    """How many tokens a model can read. RoBERTa and its kin count positions from the one after the padding's."""
    known = getattr(model.config.get_text_config(), "max_position_embeddings", None) or UNLIMITED
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return min(known, int(module.num_embeddings)) - int(module.padding_idx) - 1
    return int(known)


def keep_head_in_float32(model: Any) -> None:
    """Compute what follows an encoder in float32: in bf16, scores that differ by less than a hundredth would tie.

    `pooled_scores` does the same for language models.
    """
    heads = [child for name, child in model.named_children() if name != model.base_model_prefix]
    if len(heads) == len(list(model.children())):
        model.float()  # the encoder has an unknown name
    for head in heads:
        head.float().register_forward_pre_hook(_in_float32, with_kwargs=True)


def _in_float32(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    def cast(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

    return tuple(map(cast, args)), {name: cast(value) for name, value in kwargs.items()}


def load_classifier_reward(
    name: str,
    *,
    revision: str | None,
    label: str | None,
    completion_alone: bool,
    policy_tokenizer: Any,
    system_prompt: str | None,
    batch_size: int,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
) -> ClassifierReward:
    """Load a frozen classifier from the hub or a folder, to score a policy that has the given tokenizer.

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
    _set_padding(name, tokenizer, model.config.get_text_config())
    if not hasattr(model, "score"):
        keep_head_in_float32(model)
    return ClassifierReward(
        model.eval().requires_grad_(False).to(device),
        tokenizer,
        output_index(name, model.config, label),
        completion_alone,
        batch_size,
        own_tokens=same_tokens(tokenizer, policy_tokenizer),
        system_prompt=system_prompt,
    )


def _set_padding(name: str, tokenizer: Any, config: Any) -> None:
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise InputError(f"ppo.rewards: {name}: its tokenizer has no pad and no end token; set one in its config")
        tokenizer.pad_token = tokenizer.eos_token
    if config.pad_token_id is None:  # transformers' classifiers need one in their config to read a batch
        config.pad_token_id = tokenizer.pad_token_id


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
