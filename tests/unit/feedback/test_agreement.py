"""Agreement and conflict between principles, beside a count one pair at a time and under the exchange of A and B."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.feedback.agreement import Agreement, Label, agreement_between, agreement_figures, margins_of
from align.settings.blocks import JudgeBlock

NAMES = ("asks", "calm", "short")
# 128ths are exact under 1 - p, so the exchange of A and B is too.
PROBABILITY = st.integers(0, 128).map(lambda part: part / 128)
LABELS = st.lists(
    st.builds(
        Label,
        p_a=st.none() | PROBABILITY,
        by_principle=st.dictionaries(st.sampled_from(NAMES), PROBABILITY),
    ),
    max_size=12,
)


def exchanged(label: Label) -> Label:
    p_a = None if label.p_a is None else 1 - label.p_a
    return Label(p_a, {name: 1 - p for name, p in label.by_principle.items()})


def test_counts_are_those_worked_by_hand() -> None:
    labels = [
        Label(0.9, {"asks": 0.9, "calm": 0.8}),
        Label(0.8, {"asks": 0.9, "calm": 0.1}),
        Label(0.3, {"asks": 0.3, "calm": 0.55}),  # apart, but calm is not clear
        Label(None, {"asks": 0.9, "calm": 0.5}),  # calm prefers neither
        Label(0.9, {"asks": 0.9}),
    ]
    found = agreement_between(("asks", "calm"), labels)
    assert found.judged == ((5, 4), (4, 4))
    assert found.decided == ((5, 3), (3, 3))
    assert found.agreement == ((1.0, 1 / 3), (1 / 3, 1.0))
    assert found.conflict == ((0.0, 1 / 4), (1 / 4, 0.0))
    assert found.won == ((0, 1), (0, 0))
    assert agreement_figures(found) == {"asks × calm": {"agreement": 1 / 3, "conflict": 1 / 4}}


@pytest.mark.parametrize(
    ("block", "furthest"),
    [({}, 1.0), ({"clamp": 0.4}, 0.6), ({"chain_of_thought": True}, 0.6), ({"clamp": 0.46, "min_margin": 0.03}, 0.54)],
)
def test_principles_that_are_as_sure_as_a_judge_may_be_are_in_conflict(block: dict[str, Any], furthest: float) -> None:
    labels = [Label(None, {"asks": furthest, "calm": 1 - furthest}), Label(None, {"asks": furthest, "calm": 0.5})]
    found = agreement_between(("asks", "calm"), labels, *margins_of(JudgeBlock.model_validate(block)))
    assert found.conflict[0][1] == 1 / 2


@given(LABELS)
def test_matrices_are_what_counting_pair_by_pair_gives(labels: list[Label]) -> None:
    found = agreement_between(NAMES, labels)
    for i, one in enumerate(NAMES):
        for j, other in enumerate(NAMES):
            judged = decided = alike = opposed = 0
            for label in labels:
                if one not in label.by_principle or other not in label.by_principle:
                    continue
                p, q = label.by_principle[one], label.by_principle[other]
                judged += 1
                if abs(p - 0.5) > 0.02 and abs(q - 0.5) > 0.02:
                    decided += 1
                    alike += (p > 0.5) == (q > 0.5)
                opposed += (p > 0.6 and q < 0.4) or (p < 0.4 and q > 0.6)
            assert (found.judged[i][j], found.decided[i][j]) == (judged, decided)
            assert found.agreement[i][j] == (alike / decided if decided else None)
            assert found.conflict[i][j] == (opposed / judged if judged else None)


@given(LABELS)
def test_matrices_are_symmetric_and_a_principle_agrees_with_itself(labels: list[Label]) -> None:
    found = agreement_between(NAMES, labels)
    for matrix in (found.agreement, found.conflict, found.judged, found.decided):
        assert matrix == tuple(zip(*matrix, strict=True))
    for place in range(len(NAMES)):
        assert found.agreement[place][place] in (1.0, None)
        assert found.conflict[place][place] in (0.0, None)


@given(LABELS)
def test_exchanging_a_and_b_changes_nothing(labels: list[Label]) -> None:
    assert agreement_between(NAMES, map(exchanged, labels)) == agreement_between(NAMES, labels)


@given(LABELS)
def test_a_conflict_is_won_by_one_side_at_most(labels: list[Label]) -> None:
    found: Agreement = agreement_between(NAMES, labels)
    for i in range(len(NAMES)):
        for j in range(len(NAMES)):
            assert found.won[i][j] + found.won[j][i] <= found.opposed[i][j]


def test_the_file_form_is_json() -> None:
    found = agreement_between(("asks",), [])
    assert json.loads(json.dumps(found.as_json()))["agreement"] == [[None]]
