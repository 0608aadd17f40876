"""How rows are laid out for one pass."""

import torch

from align.rl.sequences import lay_out, lay_out_rows


def test_a_prefix_too_short_to_pay_for_a_pass_is_not_shared():
    batch = lay_out([[1, 2, 3, 4], [1, 2, 3, 5]], [[7], [8]], 1, torch.device("cpu"), share=True)
    assert batch.prefixes.width == 0 and batch.input_ids.numel() == 10


def test_rows_to_score_end_together():
    rows = lay_out_rows([[3, 4, 5], [6]], 1, torch.device("cpu"), share=False)
    assert rows.input_ids.tolist() == [[3, 4, 5], [1, 1, 6]]
    assert rows.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert rows.position_ids.tolist() == [[0, 1, 2], [0, 0, 0]]
