"""The reward of ppo_learning.py: a program, and the same program in the shape of a TRL reward model.

Needs torch alone, so that both environments of the benchmark can import it.
"""

import re
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

SHORT_WORD, FEWEST_WORDS, USUAL_SHARE = 4, 8, 0.55
MASKED = -1


def plain_words(text: str) -> float:
    """How many tenths more of a text's words have at most four letters than of what the untrained model writes.

    So its scores begin at a mean of about 0 and a standard deviation of about 1, as a reward model's are usually made
    to. A text of fewer than eight words counts as one of eight, so that one short word alone is not worth the most.
    """
    words = re.findall(r"[A-Za-z']+", text)
    share = sum(len(word) <= SHORT_WORD for word in words) / max(len(words), FEWEST_WORDS)
    return 10 * (share - USUAL_SHARE)


class _TokensAsStates(nn.Module):
    """A backbone whose hidden states are the token ids themselves, and -1 where masked."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> SimpleNamespace:
        """`hidden_states` is what `ProgramReward.score` takes, (B, L)."""
        return SimpleNamespace(hidden_states=(input_ids.masked_fill(~attention_mask.bool(), MASKED),))


class ProgramReward(nn.Module):
    """`plain_words` of a conversation's last turn, for a trainer that asks for a transformer with a score head.

    TRL's `get_reward` passes ids through the module that `base_model_prefix` names, hands its last hidden states to
    `score`, and reads one position of the result; here every position has the score.

    Args:
        tokenizer: decodes the completion.
        opening: the ids that open the assistant's turn; what follows their first appearance is the completion.
    """

    base_model_prefix = "backbone"

    def __init__(self, tokenizer: Any, opening: Sequence[int]) -> None:
        super().__init__()
        self.backbone = _TokensAsStates()
        self.tokenizer = tokenizer
        self.opening = list(opening)
        self.scored: list[tuple[str, float]] = []
        """Every text it was asked for, with its score."""

    def score(self, states: Tensor) -> Tensor:
        """(B, L) token ids to (B, L, 1) scores."""
        texts = [self._completion(row) for row in states.tolist()]
        scores = [plain_words(text) for text in texts]
        self.scored += zip(texts, scores, strict=True)
        return torch.tensor(scores)[:, None, None].expand(*states.shape, 1)

    def _completion(self, row: list[int]) -> str:
        ids = [token for token in row if token != MASKED]
        width = len(self.opening)
        start = next(place for place in range(len(ids)) if ids[place : place + width] == self.opening)
        return str(self.tokenizer.decode(ids[start + width :], skip_special_tokens=True))
