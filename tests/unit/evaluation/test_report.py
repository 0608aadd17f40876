"""A policy's figures, and how their report looks in a terminal."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from align.constitution.rules import Rule
from align.evaluation.policy_figures import policy_report
from align.evaluation.report import (
    CheckedPrinciple,
    ConstitutionUsed,
    EvaluatedSample,
    Report,
    model_paths,
    print_published_report,
    print_report,
)
from align.figures.statistics import Estimate
from align.figures.tables import Sheet, page, print_sheet, printable
from align.records import Message

CHECKED = (
    CheckedPrinciple(id="asks", rule=Rule(ends_with="?")),
    CheckedPrinciple(id="calm", rule=Rule(excludes="!"), applies=("odd",)),
)


def sample(number: int, completion: str, p_better: float | None = None, policy: str = "ppo") -> EvaluatedSample:
    return EvaluatedSample(
        id=f"{policy}/{number}",
        prompt_id=str(number),
        prompt=(Message("user", "Hi"),),
        category="odd" if number % 2 else "even",
        policy=policy,
        completion=completion,
        finish_reason="stop",
        tokens=3,
        score=float(number),
        p_better=p_better,
        kl_to_reference_k1=1.0,
        kl_to_reference_k3=2.0,
    )


SAMPLES = [sample(0, "Why?", 0.9), sample(1, "No!", 0.1), sample(2, "No!", 0.5), sample(3, "Why?", None)]


def figures():
    return policy_report(SAMPLES, CHECKED, True, seed=1, resamples=100)


def report(**changes) -> Report:
    fields = {
        "run": "quickstart/style-1234",
        "base_model": "wheel:tiny",
        "reference": "sft",
        "seed": 0,
        "prompts": 4,
        "settings": {},
        "constitution": ConstitutionUsed(id="style", title="Style", digest="0" * 64, checked=CHECKED),
        "judge": "rule",
        "policies": {"base": policy_report(SAMPLES, CHECKED, False, 1, 100), "ppo": figures()},
    }
    return Report.model_validate(fields | changes)


def shown(function, *args, width: int = 80) -> str:
    output = io.StringIO()
    function(*args, console=Console(file=output, width=width))
    return output.getvalue()


def test_figures_of_a_policy_worked_by_hand():
    found = figures()
    assert (found.rules["asks"].mean, found.rules["asks"].n) == (0.5, 4)
    assert (found.rules["calm"].mean, found.rules["calm"].n) == (0.5, 2)
    assert found.all_rules.mean == pytest.approx((1 + 0 + 0 + 1) / 4)
    assert (found.reward.mean, found.kl_to_reference_k1.mean, found.kl_to_reference_k3.mean) == (1.5, 1.0, 2.0)


def test_ties_count_half_and_abstentions_not_at_all():
    win_rate = figures().win_rate
    assert (win_rate.wins, win_rate.losses, win_rate.ties, win_rate.abstained) == (1, 1, 1, 1)
    assert (win_rate.share.mean, win_rate.share.n) == (0.5, 3)


def test_a_judge_that_always_abstains_gives_no_share():
    win_rate = policy_report([sample(0, "a"), sample(1, "b")], (), True, 1, 100).win_rate
    assert (win_rate.share, win_rate.abstained) == (None, 2)


def test_a_principle_that_applied_to_no_prompt_has_no_share():
    assert set(policy_report([sample(0, "Why?")], CHECKED, False, 1, 100).rules) == {"asks"}


def test_a_report_is_the_same_after_writing_and_reading():
    whole = report()
    assert Report.model_validate(whole.model_dump(mode="json", exclude_none=True)) == whole


def test_a_report_rejects_figures_that_are_not_finite():
    with pytest.raises(ValueError, match="finite"):
        report(
            policies={"ppo": figures().model_dump() | {"reward": {"mean": float("nan"), "low": 0, "high": 0, "n": 1}}}
        )


def test_four_policies_fit_a_terminal_of_eighty_columns():
    wide = figures().model_copy(update={"reward": Estimate(-2.25, -3.5, -1.75, 4)})
    text = shown(print_report, report(policies=dict.fromkeys(("base", "sft", "dpo", "ppo"), wide)), {})
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("[-3.50, -1.75]") == 4


def test_best_of_n_has_a_bound_in_the_table_and_no_model(tmp_path):
    best = policy_report(SAMPLES, CHECKED, True, 1, 100, kl_bound=0.636)
    whole = report(policies={"base": figures(), "best-of-4": best}, settings={"best_of": 4})
    text = shown(print_report, whole, {})
    assert "≤ 0.6" in next(line for line in text.splitlines() if "KL to sft" in line)
    assert "best-of-4: the completion with the highest reward among 4 by sft" in text
    assert set(model_paths(whole, tmp_path)) == {"base"}


def test_what_was_not_measured_has_no_estimate():
    plain = [replace(each, kl_to_reference_k1=None, kl_to_reference_k3=None, score=None) for each in SAMPLES]
    found = policy_report(plain, CHECKED, True, 1, 100)
    assert found.kl_to_reference_k1 is found.kl_to_reference_k3 is found.reward is None


def test_the_table_shows_shares_intervals_ties_and_where_the_models_are():
    text = shown(print_report, report(), {"base": "wheel:tiny", "ppo": "runs/q/ppo/model"})
    asks = next(line for line in text.splitlines() if "asks" in line)
    assert asks.count("50%") == 2
    assert "1 tied" in text
    assert "runs/q/ppo/model" in text


def test_what_was_skipped_has_a_reason_instead_of_a_row():
    text = shown(print_report, report(skipped={"reward": "`evaluate.reward` is off"}), {})
    assert "no reward: `evaluate.reward` is off" in text
    assert not any(line.startswith("│ reward") for line in text.splitlines())


def test_models_are_found_in_the_run_and_in_the_shared_folder(tmp_path):
    run = tmp_path / "quickstart" / "style-1234"
    (run / "ppo" / "model").mkdir(parents=True)
    (tmp_path / "quickstart" / "shared" / "sft" / "model").mkdir(parents=True)
    policies = dict.fromkeys(("base", "sft", "ppo", "dpo"), figures())
    paths = model_paths(report(policies=policies), run)
    assert paths["base"] == "wheel:tiny"
    assert paths["ppo"] == str(run / "ppo" / "model")
    assert paths["sft"] == str(tmp_path / "quickstart" / "shared" / "sft" / "model")
    assert paths["dpo"].startswith("not found")


def test_a_published_report_is_shown_from_its_folder(tmp_path):
    from align.run.artefacts import write_json

    (tmp_path / "run" / "evaluate").mkdir(parents=True)
    write_json(tmp_path / "run" / "evaluate" / "report.json", report().model_dump(mode="json", exclude_none=True))
    assert "quickstart/style-1234" in shown(print_published_report, tmp_path / "run" / "evaluate")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain\nline", "plain\nline"),
        ("\x1b[31mred\x07", "\ufffd[31mred\ufffd"),
        ("a\u202eb", "a\ufffdb"),
        ("tab\tx\r\ny", "tab x\ny"),
        ("👩\u200d🚀", "👩\u200d🚀"),
    ],
)
def test_nothing_printable_moves_the_cursor_or_turns_the_text(text, expected):
    assert printable(text) == expected


def test_sheets_show_markup_as_text_in_both_forms():
    sheet = Sheet("[red]t[/red]", ("a", "b"), (("<b>x</b>", "[link=http://evil]y[/link]"),), ("<i>",), labels=2)
    terminal, html = shown(print_sheet, sheet), page("p", [sheet])
    assert "[link=http://evil]y[/link]" in terminal
    assert "&lt;b&gt;x&lt;/b&gt;" in html
    assert "<i>" not in html
