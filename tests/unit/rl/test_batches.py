"""How rows are cut into minibatches and micro-batches."""

import pytest
import torch

from align.rl.batches import micro_batches, minibatch_rows, position_counts
from align.rl.rollout import Completion
from tests.unit.rl.test_rollout import prompt

PAD = 9


def completion(number: int, prompt_length: int, length: int) -> Completion:
    # The padding id is also the last token of each completion, as where the pad token is the stop token.
    return Completion(prompt(number, prompt_length), (*([7] * (length - 1)), PAD), "text", True, (0.0,) * length)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_share_each_minibatch_without_overlap(world):
    alone = minibatch_rows(16, 8, 3, 0, 1)
    shares = [minibatch_rows(16, 8, 3, rank, world) for rank in range(world)]
    for number, whole in enumerate(alone):
        parts = [share[number] for share in shares]
        assert sorted(row for part in parts for row in part) == sorted(whole)
        assert {len(part) for part in parts} == {8 // world}


def test_micro_batches_pad_prompts_on_the_left_and_completions_on_the_right():
    completions = [completion(0, 2, 3), completion(1, 4, 1)]
    (batch,) = micro_batches(completions, [0, 1], 2, PAD, torch.device("cpu"), share=False)
    rows = dict(zip(batch.rows.tolist(), range(2), strict=True))
    first, second = rows[0], rows[1]
    assert batch.sequences.input_ids[first].tolist() == [PAD, PAD, 1, 2, 7, 7, PAD]
    assert batch.sequences.attention_mask[first].tolist() == [0, 0, 1, 1, 1, 1, 1]
    assert batch.sequences.completion_mask[first].tolist() == [True, True, True], (
        "the stop token counts, though it pads"
    )
    assert batch.sequences.input_ids[second].tolist() == [1, 2, 3, 4, PAD, PAD, PAD]
    assert batch.sequences.attention_mask[second].tolist() == [1, 1, 1, 1, 1, 0, 0]
    assert batch.sequences.completion_mask[second].tolist() == [True, False, False]
    assert batch.sequences.position_ids[first].tolist() == [0, 0, 0, 1, 2, 3, 4]
    assert position_counts([batch]) == (14, 4)


def test_rows_of_like_length_share_a_micro_batch():
    completions = [completion(number, 2, length) for number, length in enumerate((9, 1, 8, 2))]
    batches = micro_batches(completions, range(4), 2, PAD, torch.device("cpu"), share=True)
    assert [sorted(batch.rows.tolist()) for batch in batches] == [[1, 3], [0, 2]]
