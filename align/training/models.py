"""The models that TRL's trainers train: a policy, or a reward model and its scores."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, PreTrainedTokenizerBase, set_seed

from align.data.chat import end_of_turn_ids, prompt_ids, special_ids
from align.errors import InputError, NotFinite
from align.models.loading import load_causal_lm
from align.models.lora import add_lora
from align.records import Message
from align.run import processes
from align.settings.blocks import ModelBlock


class ScoreHead(nn.Linear):
    """A reward model's head. It computes in float32 under any autocast; in bf16, close scores would round to one.

    Its initial standard deviation is 1 / sqrt(hidden + 1) (Huang et al. 2024, detail 7).
    """

    def __init__(self, hidden: int) -> None:
        super().__init__(hidden, 1, bias=False)
        nn.init.normal_(self.weight, std=(hidden + 1) ** -0.5)

    def forward(self, states: Tensor) -> Tensor:
        """(…, H) hidden states to (…, 1) scores."""
        with torch.autocast(states.device.type, enabled=False):
            return functional.linear(states.float(), self.weight.float())


def load_policy(path: str, block: ModelBlock, dtype: torch.dtype, seed: int, revision: str | None = None) -> Any:
    """A policy to train: an fp32 LoRA adapter on a frozen trunk in `dtype`, or, without LoRA, every weight in fp32."""
    model = _load_trunk(path, block, dtype, seed, revision)
    return add_lora(model, block.lora) if block.lora else model


def load_reward_model(path: str, block: ModelBlock, dtype: torch.dtype, seed: int, revision: str | None = None) -> Any:
    """A reward model to train: a causal language model's trunk under a new `ScoreHead`, in the dtypes of `load_policy`.

    Raises:
        InputError: transformers has no sequence classifier with a `score` head for this architecture.
    """
    causal = _load_trunk(path, block, dtype, seed, revision)
    config = causal.config
    classifier = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    if not isinstance(classifier, type):
        raise InputError(
            f"model {path}: transformers has no sequence classifier for `{config.model_type}`, so no reward model can "
            "be trained from it; use dpo, or ppo with other `rewards`, or start reward from another model"
        )
    config.num_labels = 1
    with torch.device("meta"):
        model = classifier(config)
    if not hasattr(model, "score"):
        raise InputError(
            f"model {path}: the classifier {classifier.__name__} has no `score` head, so no reward model can be "
            "trained from it; use dpo, or ppo with other `rewards`, or start reward from another model"
        )
    setattr(model, model.base_model_prefix, causal.base_model)
    model.score = ScoreHead(model.score.in_features)
    return add_lora(model, block.lora, task_type="SEQ_CLS") if block.lora else model


def _load_trunk(path: str, block: ModelBlock, dtype: torch.dtype, seed: int, revision: str | None) -> Any:
    set_seed(seed)
    weights = dtype if block.lora else torch.float32
    model = load_causal_lm(path, weights, revision=revision, trust_remote_code=block.trust_remote_code)
    if getattr(model, "is_quantized", False):
        raise InputError(
            f"model {path}: its weights are quantized, which no update can be merged into; train the model that it "
            "was quantized from"
        )
    return model


def set_separate_pad_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Give a tokenizer a pad token that does not also end turns, and have it pad on the right.

    transformers' classifiers read the score at the last token that is not padding. Where the pad token also ends turns,
    as SmolLM2's does, they would read it one token early.

    Raises:
        InputError: every special token ends turns, so that none is left for padding.
    """
    endings = {end_of_turn_ids(tokenizer)[-1], tokenizer.eos_token_id}
    named = [tokenizer.pad_token_id, getattr(tokenizer, "unk_token_id", None), tokenizer.bos_token_id]
    candidates = [*named, *tokenizer.all_special_ids, *_spare_tokens(tokenizer)]
    free = [token for token in candidates if token is not None and token not in endings]
    if not free:
        raise InputError(
            "reward: every special token of the tokenizer ends turns, but a reward model needs another for padding; "
            "name one of the model's vocabulary as `pad_token` in tokenizer_config.json, or use dpo instead of reward"
        )
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(free[0])
    tokenizer.padding_side = "right"
    return tokenizer


def _spare_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens, best for padding first: those called so, then those that conversations do not contain."""
    conversation = Message("user", "Question"), Message("assistant", "Answer"), Message("user", "Question")
    written = {*prompt_ids(tokenizer, conversation)}

    def unfitness(token: int) -> tuple[bool, bool, int]:
        name = str(tokenizer.convert_ids_to_tokens(token))
        return "pad" not in name.lower(), token in written, token

    return sorted(special_ids(tokenizer), key=unfitness)


def score_pairs(trainer: Any, rows: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    """A reward trainer's (chosen score, rejected score) of each row, in order. Every process calls it.

    Raises:
        NotFinite: a score is NaN or infinite.
    """
    if not rows:
        return []
    model = trainer.model_wrapped
    model.eval()  # not chained: DeepSpeed's engine returns None here
    size = trainer.args.per_device_train_batch_size
    dataset: Any = list(rows)
    loader = trainer.accelerator.prepare(DataLoader(dataset, batch_size=size, collate_fn=trainer.data_collator))
    batches: list[Tensor] = []
    for batch in tqdm(loader, desc="scoring pairs", disable=not processes.is_first() or trainer.args.disable_tqdm):
        with torch.no_grad():
            outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        scores = outputs.logits.float().reshape(2, -1).T.contiguous()  # (B, 2)
        batches.append(trainer.accelerator.gather(scores).cpu())
    scores = torch.cat(batches)[: len(rows)]  # accelerate fills the last batches up with the first rows
    if not scores.isfinite().all():
        row = int((~scores.isfinite()).any(dim=1).nonzero()[0])
        text = trainer.processing_class.decode(rows[row]["chosen_ids"], skip_special_tokens=True)
        raise NotFinite(f"reward: the trained model's score is not finite for the pair {text[:80]!r}; train it again")
    return [(chosen, rejected) for chosen, rejected in scores.tolist()]
