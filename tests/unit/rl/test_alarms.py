"""Each alarm fires on a history with its fault, and on no healthy, noisy or spiked one."""

import random
from itertools import pairwise

import numpy as np
import pytest

from align.rl.alarms import WatchedRun, fired, higher_share
from align.rl.settings import WatchBlock
from tests.unit.rl.test_metric_history import history_of

BLOCK = WatchBlock(window=6, repeat_after=15, value_warmup=10)
LENGTH_WORTH = 0.02
"""What each token adds to the score."""


def healthy(iterations=60, seed=0, noise=1.0):
    """A healthy run: the score rises and flattens, the gold score with it, and nothing else moves much."""
    draw = random.Random(seed)

    def around(value, spread):
        return value + noise * draw.gauss(0, spread)

    for step in range(1, iterations + 1):
        learnt = 1 - 0.95**step
        extra = around(0, 2.0)
        quality = around(learnt, 0.08)
        yield {
            "step": step,
            "score": quality + LENGTH_WORTH * extra,
            "score_length_controlled": around(quality, 0.01),
            "score/gold": around(0.5 * learnt, 0.08),
            "kl_to_reference_k1": around(8 * learnt, 1.0),
            "entropy": around(2.0 - 0.5 * step / iterations, 0.1),
            "repetition": abs(around(0.05, 0.03)),
            "explained_variance": around(min(0.6, step / 20), 0.15),
            "sampling_gap": abs(around(0.01, 0.005)),
            "stopped_share": min(1.0, around(0.9, 0.06)),
        }


def turned(name, change, seed=0):
    """A healthy run in which `change(value, iterations since the 20th)` replaces one figure."""
    for row in healthy(seed=seed):
        yield row | {name: change(row[name], max(row["step"] - 20, 0))}


def fired_in(rows, block=BLOCK, gold=("gold",)):
    """{alarm: iterations in which it fired}, given the rows one by one."""
    history, found = [], {}
    for row in rows:
        history.append(dict(row))
        for alarm in fired(WatchedRun(history, block, gold)):
            history[-1][f"alarm/{alarm.name}"] = 1.0
            found.setdefault(alarm.name, []).append(row["step"])
    return found


FAULTS = {
    "kl_limit": ("kl_to_reference_k1", lambda value, ago: value + 3.0 * ago),
    "kl_growth": ("kl_to_reference_k1", lambda value, ago: value * 1.25 ** min(ago, 16)),
    "entropy_collapse": ("entropy", lambda value, ago: value * 0.85**ago),
    "length_hacking": ("score", lambda value, ago: value + 0.05 * ago),
    "gold_fall": ("score/gold", lambda value, ago: value - 0.02 * ago),
    "repetition_rise": ("repetition", lambda value, ago: value + 0.01 * ago),
    "value_failure": ("explained_variance", lambda value, ago: value - 0.05 * ago),
    "sampling_gap": ("sampling_gap", lambda value, ago: value + 0.01 * ago),
    "stopped_fall": ("stopped_share", lambda value, ago: value - 0.015 * ago),
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", FAULTS)
def test_an_alarm_fires_once_its_figure_goes_wrong_and_not_before(name, seed):
    found = fired_in(turned(*FAULTS[name], seed=seed))
    assert name in found
    assert found[name][0] > 20
    assert set(found) <= {name} | ({"kl_limit", "kl_growth"} if name.startswith("kl") else set())


def test_every_alarm_has_a_history_made_for_it_here():
    thresholds = set(WatchBlock.model_fields) - {"window", "repeat_after", "value_warmup"}
    assert thresholds == set(FAULTS)


@pytest.mark.parametrize("name", FAULTS)
def test_a_threshold_of_null_turns_its_alarm_off(name):
    assert name not in fired_in(turned(*FAULTS[name]), BLOCK.model_copy(update={name: None}))


@pytest.mark.parametrize("noise", [0.0, 1.0, 2.0])
def test_a_healthy_run_is_quiet_however_noisy(noise):
    for seed in range(10):
        assert fired_in(healthy(120, seed, noise), WatchBlock()) == {}, seed


@pytest.mark.parametrize("name", FAULTS)
def test_single_iterations_far_off_fire_nothing(name):
    figure, _ = FAULTS[name]
    for factor in (-100.0, 0.0, 100.0):
        rows = [row | ({figure: row[figure] * factor} if row["step"] % 7 == 0 else {}) for row in healthy()]
        assert fired_in(rows) == {}, factor


def test_an_alarm_that_persists_is_reported_again_after_a_while():
    steps = fired_in(turned("sampling_gap", lambda value, ago: value + (ago > 0)))["sampling_gap"]
    assert steps[0] < 26
    assert {later - earlier for earlier, later in pairwise(steps)} == {BLOCK.repeat_after}


def test_a_sentence_says_how_much_and_what_to_do():
    rows = list(turned("kl_to_reference_k1", lambda value, ago: 72.0 if ago else value))[:30]
    [alarm] = [alarm for alarm in fired(WatchedRun(rows, BLOCK)) if alarm.name == "kl_limit"]
    assert alarm.sentence == (
        "the policy is 72 nats per completion from the reference, over ppo.watch.kl_limit 50: raise ppo.kl_coef or set "
        "ppo.kl_target, or lower ppo.optimizer.learning_rate"
    )


def test_only_named_sources_are_gold():
    rows = list(turned(*FAULTS["gold_fall"]))
    assert fired_in(rows, gold=()) == {}


@pytest.mark.parametrize(("quality", "alarms"), [(0.0, {"length_hacking"}), (0.02, set())])
def test_a_score_that_only_follows_length_is_reported_and_one_that_also_improves_is_not(quality, alarms):
    """Completions grow by one token per iteration, each worth 0.02."""
    generator = np.random.default_rng(3)
    found = []
    for number in range(40):
        lengths = generator.integers(5, 30, 24) + 1.0 * number
        found.append((0.02 * lengths + quality * number + generator.normal(0, 0.2, 24), lengths))
    assert set(fired_in(history_of(found, BLOCK.window))) == alarms


def test_the_share_of_pairs_counts_ties_half():
    assert higher_share([2, 3], [1, 2]) == (1 + 0.5 + 1 + 1) / 4
    assert higher_share([5, 6], [1, 2]) == 1
    assert higher_share([], [1, 2]) == 0.5
