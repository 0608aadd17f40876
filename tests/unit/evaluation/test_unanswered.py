"""What is made of completions that have no answer, and of sampling that estimates no KL."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from align.constitution.rules import Rule
from align.evaluation.best_of import best_of_each
from align.evaluation.policy_figures import policy_report
from align.evaluation.report import CheckedPrinciple, EvaluatedSample, report_sheet
from align.evaluation.samples import with_divergence
from align.evaluation.verdicts import Judged, _questions_against_base
from align.records import Message
from align.settings.blocks import ModelBlock, SamplingBlock
from align.stages.evaluate import EvaluateBlock, make_report


def sample(policy: str, number: int, completion: str = "yes", **changes: Any) -> EvaluatedSample:
    row = EvaluatedSample(
        id=f"{policy}/{number}",
        prompt_id=str(number),
        prompt=(Message("user", "hi"),),
        category="",
        policy=policy,
        completion=completion,
        finish_reason="stop",
        tokens=2,
    )
    return replace(row, **changes)


def unanswered(policy: str, number: int) -> EvaluatedSample:
    return sample(policy, number, "", answered=False, finish_reason="length", thought="<think>hm")


def test_best_of_n_takes_a_completion_without_an_answer_only_if_there_is_no_other() -> None:
    candidates = [
        unanswered("sft", 0),
        sample("sft", 0, "low", score=-9.0),
        sample("sft", 0, "high", score=-1.0),
        unanswered("sft", 1),
        unanswered("sft", 1),
    ]
    assert [each.completion for each in best_of_each(candidates, "best-of-3")] == ["high", ""]


def test_the_judge_is_asked_about_pairs_of_answers_alone_and_the_rest_count_as_abstentions() -> None:
    samples = [sample("base", 0, "no"), sample("base", 1, "no"), unanswered("base", 2)]
    samples += [sample("ppo", 0), unanswered("ppo", 1), sample("ppo", 2)]
    assert set(_questions_against_base(samples)) == {"ppo/0"}
    verdict = SimpleNamespace(p_a=0.9, reason="", decided_by=())
    judged = Judged("judge", None, SimpleNamespace(id="p"), {"ppo/0": verdict}, frozenset({"2"}))  # type: ignore[arg-type, dict-item]
    found = [judged.annotate(each) for each in samples[3:]]
    assert [each.p_better for each in found] == [0.9, None, None]
    report = policy_report(found, (), True, 0, 10)
    assert report.win_rate is not None and report.answered == pytest.approx(2 / 3)
    assert (report.win_rate.wins, report.win_rate.losses, report.win_rate.abstained) == (1, 0, 2)


def test_no_rule_is_kept_by_saying_nothing() -> None:
    rule = CheckedPrinciple(id="short", rule=Rule(excludes_regex="x"))
    report = policy_report([sample("ppo", 0, "x"), unanswered("ppo", 1)], [rule], False, 0, 10)
    assert report.rules["short"].mean == 0 and report.rules["short"].n == 1


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"top_p": 0.9}])
def test_greedy_and_nucleus_sampling_estimate_no_kl(sampling: dict[str, float]) -> None:
    block = SamplingBlock(**sampling)
    context: Any = SimpleNamespace(shared={"model": None}, settings=SimpleNamespace(sampling=block))
    [found] = with_divergence([sample("ppo", 0)], context)
    assert found.kl_to_reference_k1 is None and found.kl_to_reference_k3 is None


@pytest.mark.parametrize(("best_of", "missing"), [(None, "KL to sft (nats)"), (4, "estimate of the KL")])
def test_the_report_says_why_there_is_no_kl(best_of: int | None, missing: str) -> None:
    settings = EvaluateBlock(policies=("base", "sft"), sampling=SamplingBlock(top_p=0.9), best_of=best_of)
    shared, inputs = {"model": ModelBlock(path="m")}, {"sft": Path("sft")}
    context: Any = SimpleNamespace(settings=settings, shared=shared, inputs=inputs, run_name="run", seed=0)
    samples = [sample(policy, 0, score=1.0) for policy in settings.reported]
    report = make_report(samples, None, "no judge", context)
    assert report.skipped[missing].startswith("with `evaluate.sampling.top_p` below 1")
    assert all(each.kl_to_reference_k1 is None for each in report.policies.values())
    rows = {row[0]: row[1:] for row in report_sheet(report).rows}
    assert rows.get("KL to sft (nats)") == (("-", "-", "≤ 0.6") if best_of else None)
