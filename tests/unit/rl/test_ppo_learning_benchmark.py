"""The learning benchmark's conclusions and its reward, on runs made up by hand."""

import numpy as np
import pytest
import torch
from learning_curves import Level, compare, reward_curve, shared_levels, verdict
from program_reward import ProgramReward, plain_words

from tests.tiny import build_tokenizer


def line(slope: float, start: float, furthest: float):
    """A run whose reward is its KL times a slope plus a start."""
    kl = np.linspace(0.0, furthest, 50)
    return reward_curve(kl, slope * kl + start, window=1)


def test_curve_of_a_straight_run_is_the_straight_line():
    curve = reward_curve(kl=np.arange(10.0), reward=2 * np.arange(10.0) + 1, window=3)
    np.testing.assert_allclose(curve.kl, np.arange(1.0, 9.0))
    np.testing.assert_allclose(curve.at(np.array([1.0, 2.5, 8.0])), [3.0, 6.0, 17.0])


def test_curve_is_unknown_outside_the_kl_that_the_run_reached():
    curve = reward_curve(kl=[1.0, 2.0, 3.0], reward=[0.0, 1.0, 2.0], window=1)
    assert np.isnan(curve.at(np.array([0.9, 3.1]))).all()


def test_curve_is_in_order_of_kl_where_the_run_came_back():
    curve = reward_curve(kl=[0.0, 4.0, 2.0], reward=[0.0, 40.0, 20.0], window=1)
    np.testing.assert_allclose(curve.at(np.array([1.0, 3.0])), [10.0, 30.0])


def test_fewer_steps_than_are_averaged_make_no_curve():
    with pytest.raises(ValueError, match="2 steps are fewer than the 5"):
        reward_curve([0.0, 1.0], [0.0, 1.0])


def test_levels_are_round_and_within_the_range_of_every_curve():
    levels = shared_levels([line(1, 0, furthest=9.0), line(1, 0, furthest=3.3)], count=8)
    np.testing.assert_allclose(levels, [0, 0.5, 1, 1.5, 2, 2.5, 3])


def test_curves_that_share_no_kl_have_no_levels_and_no_verdict():
    low, high = reward_curve([0.0, 1.0], [0, 0], window=1), reward_curve([2.0, 3.0], [0, 0], window=1)
    assert compare([low], [high]) == []
    assert "nothing to compare" in verdict([])


def test_comparison_is_the_mean_and_the_samples_deviation_over_seeds():
    levels = compare([line(1, start, 4.0) for start in (0, 1, 2)], [line(2, start, 4.0) for start in (0, 3)])
    at_two = next(level for level in levels if level.kl == 2)
    assert at_two.ours == pytest.approx((3.0, 1.0))
    assert at_two.theirs == pytest.approx((5.5, 4.5**0.5))
    assert at_two.spread == pytest.approx(((1.0 + 4.5) / 2) ** 0.5)


@pytest.mark.parametrize(("reward", "worse"), [(0.50, False), (0.41, False), (0.39, True)])
def test_ours_is_worse_where_it_is_below_theirs_by_more_than_the_spread(reward, worse):
    level = Level(3.0, ours=(reward, 0.1), theirs=(0.5, 0.1))
    assert level.worse is worse
    assert ("Ours is worse" in verdict([level])) is worse


def test_verdict_names_the_kl_where_ours_is_worse():
    levels = [Level(1.0, (0.5, 0.1), (0.5, 0.1)), Level(1.5, (0.1, 0.1), (0.5, 0.1))]
    assert verdict(levels).startswith("Ours is worse than TRL's by more than the seeds' spread at 1.5 nats")


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("It is a red fox and it can't swim", 8 / 9),
        ("Photosynthesis transforms radiation", 0.0),
        ("yes", 1 / 8),
        ("", 0.0),
        ("one, two!\n- three four five 6 seven eight nine", 5 / 8),
    ],
)
def test_plain_words_counts_words_of_at_most_four_letters(text, share):
    assert plain_words(text) == pytest.approx(10 * (share - 0.55))


def test_reward_module_scores_the_completion_alone_whatever_the_padding():
    tokenizer = build_tokenizer()
    opening, end = tokenizer("<|im_start|>assistant\n")["input_ids"], tokenizer.eos_token_id
    prompts = ["<|im_start|>user\na b c d e f g h i j<|im_end|>\n", "<|im_start|>user\nx<|im_end|>\n"]
    completions = ["the cat sat on the mat and ran", "photographers everywhere the"]
    parts = [
        [tokenizer(text)["input_ids"] for text in (prompt, completion)]
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    rows = [torch.tensor([*prompt, *opening, *completion, end]) for prompt, completion in parts]
    ids = torch.full((2, 3 + max(map(len, rows)) + 2), 299)
    attended = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, 3 : 3 + len(row)], attended[number, 3 : 3 + len(row)] = row, 1
    reward = ProgramReward(tokenizer, opening)
    backbone = getattr(reward, reward.base_model_prefix)
    scores = reward.score(backbone(input_ids=ids, attention_mask=attended).hidden_states[-1])
    assert scores.shape == (*ids.shape, 1)
    assert (scores[:, :, 0] == torch.tensor([[plain_words(text)] for text in completions])).all()
    assert [text for text, _ in reward.scored] == completions
