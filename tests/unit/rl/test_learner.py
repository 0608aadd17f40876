"""The learning-rate schedule, against worked figures."""

import math

import pytest

from align.rl.learner import schedule_factor


def test_learning_rate_schedules():
    assert [schedule_factor(i, 4, "linear", 0.0) for i in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert [schedule_factor(i, 4, "constant", 0.0) for i in range(4)] == [1.0] * 4
    assert schedule_factor(2, 4, "cosine", 0.0) == pytest.approx(0.5 * (1 + math.cos(math.pi / 2)), abs=1e-6)
    warm = [schedule_factor(i, 10, "constant", 0.3) for i in range(4)]
    assert warm == pytest.approx([0.25, 0.5, 0.75, 1.0])
