"""Every constitution of the project loads, can be revised and judged by, and its probes agree with its rules."""

from pathlib import Path

import pytest

from align.constitution.constitution import Constitution
from align.constitution.loading import load_constitution

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "constitutions").rglob("*.yaml"))


def test_constitutions_are_shipped() -> None:
    assert FILES


@pytest.fixture(params=FILES, ids=[str(file.relative_to(ROOT)) for file in FILES])
def constitution(request: pytest.FixtureRequest) -> Constitution:
    return load_constitution(request.param)


def test_it_describes_itself(constitution: Constitution) -> None:
    assert constitution.licence
    assert constitution.source
    assert constitution.preamble


def test_each_principle_can_be_revised_chosen_and_contrasted_by(constitution: Constitution) -> None:
    for principle in constitution.principles:
        assert principle.requests is not None, principle.id
        assert principle.question is not None, principle.id
        assert principle.text and principle.opposite, principle.id
        assert principle.text != principle.opposite, principle.id


def test_each_principle_has_probes_that_its_rule_agrees_with(constitution: Constitution) -> None:
    for principle in constitution.principles:
        assert principle.probes, principle.id
        for probe in principle.probes:
            assert probe.better != probe.worse, principle.id
            if principle.rule is not None:
                assert principle.rule.holds(probe.better), (principle.id, probe.better)
                assert not principle.rule.holds(probe.worse), (principle.id, probe.worse)


def test_worked_examples_end_better_than_they_began(constitution: Constitution) -> None:
    for example in constitution.examples:
        assert example.revision != example.completion
        if example.principle:
            principle = constitution.principle(example.principle)
            assert principle.keeps_rule(example.revision), example.revision
            assert principle.rule is None or not principle.keeps_rule(example.completion), example.completion


def test_constitutions_have_distinct_identities() -> None:
    keys = [load_constitution(file).digest for file in FILES]
    assert len(set(keys)) == len(keys)
