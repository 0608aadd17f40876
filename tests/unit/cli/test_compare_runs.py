"""Comparisons of evaluated runs whose every completion is written here, so that each figure is known."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from align.cli.compare_runs import print_comparison
from align.constitution.rules import Rule
from align.errors import InputError
from align.evaluation.report import CheckedPrinciple, ConstitutionUsed, EvaluatedSample, PolicyReport, Report
from align.figures.statistics import Estimate, share_estimate
from align.figures.text_metrics import text_figures
from align.records import Message, write_rows
from align.results.run_comparison import (
    AgainstNull,
    against_null,
    compared_figures,
    crossed_rules,
    differing_settings,
    load_run,
)

ASKING = (CheckedPrinciple(id="asks", rule=Rule(ends_with="?")), CheckedPrinciple(id="calm", rule=Rule(excludes="!")))
TELLING = (
    CheckedPrinciple(id="tells", rule=Rule(not_ends_with="?")),
    CheckedPrinciple(id="loud", rule=Rule(contains="!")),
)
QUESTION, CRY, STATEMENT = "Is it?", "It is!", "It is."


def write_run(
    directory: Path, checked: tuple[CheckedPrinciple, ...], completions: dict[str, list[str]], **changes: Any
) -> Path:
    """An evaluated run whose policies gave these completions to prompts p0, p1, …"""
    samples = [
        EvaluatedSample(
            id=f"{policy}/p{number}",
            prompt_id=f"p{number}",
            prompt=(Message("user", f"Question {number}"),),
            category="odd" if number % 2 else "even",
            policy=policy,
            completion=text,
            finish_reason="stop",
            tokens=len(text),
            kl_to_reference_k1=0.5,
        )
        for policy, texts in completions.items()
        for number, text in enumerate(texts)
    ]
    kl = Estimate(0.5, 0.5, 0.5, 1)
    policies = {
        policy: PolicyReport(
            reward=Estimate(1.25, 1.0, 1.5, len(texts)),
            kl_to_reference_k1=kl,
            kl_to_reference_k3=kl,
            text=text_figures(texts, [3] * len(texts), ["stop"] * len(texts)),
        )
        for policy, texts in completions.items()
    }
    fields: dict[str, Any] = {
        "run": directory.name,
        "base_model": "tiny",
        "reference": "sft",
        "seed": 1,
        "prompts": len(samples) // len(completions),
        "settings": {"sampling": {"temperature": 1.0}},
        "constitution": ConstitutionUsed(id=directory.name, title="T", digest="0123456789abcdef", checked=checked),
        "policies": policies,
    }
    folder = directory / "evaluate"
    folder.mkdir(parents=True)
    report = Report(**{**fields, **changes})
    (folder / "report.json").write_text(json.dumps(report.model_dump(mode="json", exclude_none=True)))
    write_rows(folder / "samples.jsonl", samples)
    return directory


def output_of(run_a: Path, run_b: Path, **options: Any) -> str:
    output = io.StringIO()
    console = Console(file=output, width=200)
    print_comparison(run_a, run_b, console=console, **options)
    return output.getvalue()


@pytest.fixture
def asking(tmp_path):
    return write_run(tmp_path / "asking", ASKING, {"base": [CRY] * 20, "ppo": [QUESTION] * 16 + [CRY] * 4})


@pytest.fixture
def telling(tmp_path):
    return write_run(tmp_path / "telling", TELLING, {"base": [CRY] * 20, "ppo": [CRY] * 15 + [STATEMENT] * 5})


def test_opposed_runs_have_a_winning_diagonal_with_the_figures_worked_by_hand(asking, telling):
    (cross,) = crossed_rules(load_run(asking), load_run(telling))
    (a_on_a, a_on_b), (b_on_a, b_on_b) = cross.cells
    assert cross.policy == "ppo"
    assert (a_on_a.mean, a_on_b.mean) == pytest.approx((16 / 20, 4 / 20))
    assert (b_on_a.mean, b_on_b.mean) == pytest.approx((2.5 / 20, 17.5 / 20))
    assert [gain.mean for gain in cross.gains] == pytest.approx([16 / 20 - 2.5 / 20, 17.5 / 20 - 4 / 20])
    assert cross.diagonal_wins
    assert "ppo: each run's policy follows its own rules better" in output_of(asking, telling)


def test_policies_that_write_alike_have_no_winning_diagonal(tmp_path):
    texts = {"ppo": [QUESTION, CRY] * 10}
    same = [write_run(tmp_path / name, rules, texts) for name, rules in (("a", ASKING), ("b", TELLING))]
    (cross,) = crossed_rules(*map(load_run, same))
    assert [gain.mean for gain in cross.gains] == [0.0, 0.0]
    assert "ppo: each run's policy is not shown to follow its own rules better" in output_of(*same)


def test_one_prompt_is_too_few_for_a_winning_diagonal(tmp_path):
    a = write_run(tmp_path / "a", ASKING, {"ppo": [QUESTION]})
    b = write_run(tmp_path / "b", TELLING, {"ppo": [CRY]})
    (cross,) = crossed_rules(load_run(a), load_run(b))
    assert [gain.mean for gain in cross.gains] == [1.0, 1.0]
    assert not cross.diagonal_wins


def test_swapping_the_runs_turns_differences_around(asking, telling):
    forward = {(each.policy, each.figure): each for each in compared_figures(load_run(asking), load_run(telling))}
    backward = {(each.policy, each.figure): each for each in compared_figures(load_run(telling), load_run(asking))}
    length = ("ppo", "length (tokens)")
    assert forward[length].difference.mean == -backward[length].difference.mean
    assert forward["ppo", "A's asks (ends_with '?')"].difference.mean == pytest.approx(-16 / 20)


def test_rewards_of_two_reward_models_stand_beside_each_other_without_a_difference(asking, telling):
    rewards = [each for each in compared_figures(load_run(asking), load_run(telling)) if each.figure == "reward"]
    assert [(each.a.mean, each.b.mean, each.difference) for each in rewards] == [(1.25, 1.25, None)] * 2


def test_a_rule_counts_only_on_the_prompts_it_applies_to(tmp_path):
    rules = (CheckedPrinciple(id="asks", rule=Rule(ends_with="?"), applies=("odd",)),)
    runs = [write_run(tmp_path / name, rules, {"ppo": [CRY, QUESTION] * 6}) for name in "ab"]
    first, *_ = compared_figures(*map(load_run, runs))
    assert (first.a.mean, first.a.n) == (1.0, 6)


def test_only_prompts_of_both_runs_are_compared(tmp_path):
    long = write_run(tmp_path / "long", ASKING, {"ppo": [QUESTION] * 3 + [CRY] * 5})
    short = write_run(tmp_path / "short", ASKING, {"ppo": [QUESTION] * 3})
    first, *_ = compared_figures(load_run(long), load_run(short))
    assert (first.a.mean, first.b.mean, first.a.n) == (1.0, 1.0, 3)
    assert differing_settings(load_run(long), load_run(short)) == ["held-out prompts"]


def test_null_run_that_stays_put_lets_the_real_change_stand_out(tmp_path, asking, telling):
    null = write_run(tmp_path / "null", ASKING, {"base": [CRY] * 20, "ppo": [QUESTION] * 15 + [CRY] * 5})
    moves = {each.principle: each for each in against_null(*map(load_run, (asking, telling, null)))}
    asks = moves["A's asks (ends_with '?')"]
    assert (asks.to_b.mean, asks.to_c.mean) == pytest.approx((-16 / 20, -1 / 20))
    assert asks.beyond_null
    assert {each.policy for each in moves.values()} == {"ppo"}
    assert "compared with null run C" in output_of(asking, telling, null=null)


def test_a_null_run_that_moves_as_far_swallows_the_change(tmp_path, asking, telling):
    moves = against_null(*map(load_run, (asking, telling, telling)))
    assert [each.beyond_null for each in moves] == [False] * len(moves)


@pytest.mark.parametrize(
    ("to_b", "to_c", "beyond"),
    [
        ((0.3, 0.5), (-0.2, 0.1), True),
        ((-0.5, -0.3), (-0.2, 0.1), True),
        ((-0.5, -0.3), (0.1, 0.4), False),
        ((-0.1, 0.9), (0.0, 0.0), False),
    ],
)
def test_beyond_null_is_decided_by_the_nearest_and_the_furthest_end(to_b, to_c, beyond):
    move = AgainstNull("ppo", "asks", share_estimate([1, 0], 0), Estimate(0, *to_b, 9), Estimate(0, *to_c, 9))
    assert move.beyond_null is beyond


def test_settings_that_differ_besides_the_constitution_are_named(tmp_path, asking):
    other = write_run(tmp_path / "other", TELLING, {"base": [CRY] * 20, "ppo": [CRY] * 20}, seed=2, base_model="big")
    assert differing_settings(load_run(asking), load_run(other)) == ["base model", "seed"]
    assert "B differs from A in base model, seed" in output_of(asking, other)


def test_without_rules_the_output_says_why_there_is_no_crossed_rules(tmp_path, asking):
    plain = write_run(tmp_path / "ethics", (), {"ppo": [CRY] * 20})
    assert "no principle has a rule in ethics" in output_of(asking, plain)


def test_completions_of_the_first_prompts_stand_side_by_side(asking, telling):
    output = output_of(asking, telling, limit=2)
    assert "Question 1" in output
    assert "Question 2" not in output
    assert any(QUESTION in line and CRY in line for line in output.splitlines())


def test_the_page_shows_hostile_text_as_text(tmp_path):
    hostile = "<script>alert('x')</script> & [bold]b[/bold] \x1b[31mred"
    runs = [write_run(tmp_path / name, ASKING, {"ppo": [hostile, CRY]}) for name in "ab"]
    output = output_of(*runs, html=tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; &amp; [bold]b[/bold]" in text
    assert "<script" not in text
    assert "\x1b" not in text + output
    assert "[bold]b[/bold]" in output


def test_the_page_needs_nothing_from_elsewhere(tmp_path, asking, telling):
    output_of(asking, telling, html=tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "default-src 'none'" in text
    assert not any(mark in text for mark in ("http://", "https://", " src=", "@import"))


def test_a_page_that_cannot_be_written_is_a_clear_error(tmp_path, asking, telling):
    with pytest.raises(InputError, match="cannot be written"):
        output_of(asking, telling, html=tmp_path / "missing" / "page.html")


def test_a_run_that_was_not_evaluated_is_named(tmp_path, asking):
    (tmp_path / "raw").mkdir()
    with pytest.raises(InputError, match=r"raw/report\.json: no such file; run `align run evaluate`"):
        output_of(asking, tmp_path / "raw")


def test_a_report_of_another_version_names_its_faults(asking):
    path = asking / "evaluate" / "report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"colour": "red"}))
    with pytest.raises(InputError, match=r"(?s)report\.json: 1 problem.*colour"):
        load_run(asking)


def test_runs_with_nothing_in_common_are_refused(tmp_path, asking):
    other = write_run(tmp_path / "other", ASKING, {"dpo": [CRY]})
    with pytest.raises(InputError, match="no policy and prompt in common"):
        output_of(asking, other)
