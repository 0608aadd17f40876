"""When a run stops and which checkpoint it publishes, worked by hand."""

import pytest
from pydantic import ValidationError

from align.rl.early_stop import Ending, best_checkpoint, ending, stop_reason
from align.rl.settings import EarlyStopBlock, PpoBlock


def history_of(scores, kl=None):
    kls = kl or [0.0] * len(scores)
    return [
        {"step": step, "score": score, "kl_to_reference_k1": each}
        for step, (score, each) in enumerate(zip(scores, kls, strict=True), start=1)
    ]


def block(**changes):
    return EarlyStopBlock(**{"window": 1, **changes})


def test_a_run_stops_after_so_many_iterations_without_a_new_best():
    history = history_of([1, 3, 2, 2, 3, 2])
    found = [stop_reason(history[:end], block(patience=4)) for end in range(1, 7)]
    assert found[:5] == [None] * 5, "an equal score is no new best"
    assert found[5] == "score over 1 iterations has had no new best for 4 iterations (3 at iteration 2, 2 now)"


def test_the_mean_over_a_window_decides_and_not_a_single_lucky_iteration():
    history = history_of([1, 9, 1, 2, 3, 4, 5, 6])
    assert stop_reason(history, block(patience=3)) is not None
    assert stop_reason(history, block(patience=3, window=3)) is None


def test_nothing_stops_before_a_window_is_full():
    assert stop_reason(history_of([3, 2, 1], kl=[9, 9, 9]), block(patience=1, kl_above=1, window=4)) is None


def test_a_mean_kl_above_the_limit_stops():
    history = history_of([1, 2, 3], kl=[0, 4, 8])
    assert stop_reason(history, block(kl_above=6, window=2)) is None
    reason = stop_reason(history, block(kl_above=5.9, window=2))
    assert reason == "the KL to the reference was 6 nats a completion over 2 iterations, above 5.9"


def test_a_checkpoint_is_judged_by_the_rollout_that_its_policy_wrote():
    # The update of iteration 3 spoils the policy: iteration 3 still shows the best score, 4 what its checkpoint is.
    history = history_of([1, 2, 3, 0, 0])
    assert best_checkpoint(history, [2, 3, 5], block()) == 2


def test_the_last_checkpoint_is_judged_by_the_mean_that_ends_with_it():
    assert best_checkpoint(history_of([1, 2, 3, 4]), [2, 4], block()) == 4


def test_checkpoints_over_the_kl_limit_are_not_published():
    history = history_of([1, 2, 3, 4, 5], kl=[0, 1, 2, 7, 9])
    assert best_checkpoint(history, [1, 2, 3, 5], block(kl_above=5)) == 2
    assert best_checkpoint(history, [1, 2, 3, 5], block()) == 5


def test_the_earlier_of_equally_good_checkpoints_is_best():
    assert best_checkpoint(history_of([1, 5, 1, 5, 1]), [1, 3, 4], block()) == 1


def test_the_newest_checkpoint_is_best_if_none_can_be_judged():
    assert best_checkpoint(history_of([1, 2]), [1, 2], block(window=5)) == 2


def test_keeping_only_the_best_and_the_newest_checkpoint_finds_the_best_of_all():
    scores = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9]
    kept = []
    for iteration in range(1, len(scores) + 1):
        history = history_of(scores[:iteration])
        kept = [*({best_checkpoint(history, kept, block(window=2))} if kept else ()), iteration]
        every = list(range(1, iteration + 1))
        assert best_checkpoint(history, kept, block(window=2)) == best_checkpoint(history, every, block(window=2))


def test_a_run_ends_with_its_iterations_or_its_rule_and_says_whose_policy_it_leaves():
    history = history_of([5, 1, 1])
    assert ending(history, [1, 2, 3], 3, 4, None) is None
    assert ending(history, [3], 3, 3, None) == Ending(3, None, 3)
    assert ending(history, [1, 3], 3, 9, block(patience=9)) is None
    assert ending(history, [1, 3], 3, 9, block(patience=2, roll_back=False)).published == 3
    assert ending(history_of([1, 5, 1, 1]), [1, 4], 4, 9, block(patience=2)).published == 1
    assert ending(history_of([1, 5, 1, 1]), [1, 4], 4, 4, block()) == Ending(4, None, 1)


def test_the_sentence_says_when_why_and_what_is_published():
    assert Ending(4, None, 4).sentence == ""
    assert Ending(4, None, 2).sentence == (
        "the run ended after iteration 4; the policy of iteration 2, the best checkpoint, is published"
    )
    assert Ending(4, "it got worse", 4).sentence == (
        "the run ended after iteration 4 because it got worse; its last policy is published"
    )


TWO = ({"stage": "reward"}, {"function": "mine:short", "gold": True})


@pytest.mark.parametrize("figure", ["score", "reward", "score_length_controlled", "score/reward", "score/short"])
def test_a_run_can_be_stopped_by_any_score(figure):
    assert PpoBlock(rewards=TWO, early_stop={"figure": figure}).early_stop.figure == figure


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        (
            {"rewards": TWO, "early_stop": {"figure": "score/long"}},
            "choose one of score, .*, score/reward, score/short",
        ),
        ({"early_stop": {"figure": "score/reward"}}, "no figure 'score/reward' to follow"),
        ({"early_stop": {"roll_back": False}}, "early_stop has no rule: set patience, kl_above or roll_back"),
    ],
)
def test_a_rule_that_could_not_work_is_refused(settings, fault):
    with pytest.raises(ValidationError, match=fault):
        PpoBlock(**settings)
