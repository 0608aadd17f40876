"""`align compare-runs RUN_A RUN_B`: completions side by side, differences, and who follows whose rules.

    align compare-runs runs/quickstart/style-asking-0a1b2c3d runs/quickstart/style-telling-4e5f6a7b \\
        --null runs/quickstart/style-asking-paraphrased-8c9d0e1f --html comparison.html
"""

from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from align.cli.output import show_sheets
from align.evaluation.report import number_text, share_difference_text, share_text
from align.figures.tables import Sheet, conversation_text
from align.records import Conversation
from align.results.run_comparison import (
    ComparedFigure,
    CrossedRules,
    Run,
    against_null,
    compared_figures,
    crossed_rules,
    differing_settings,
    load_run,
    paired,
    shared_policies,
)


def print_comparison(
    run_a: Path,
    run_b: Path,
    limit: int = 5,
    html: Path | None = None,
    null: Path | None = None,
    console: Console | None = None,
) -> None:
    """Print the comparison of two evaluated runs, and write it as an HTML page if `html` names a file.

    Args:
        limit: number of prompts whose completions are shown.
        null: a control that should not differ from `run_a` (a paraphrased constitution, or another seed). Its
            differences are shown next to those of `run_b`.

    Raises:
        InputError: a run has not been evaluated, the runs share no policy and prompt, or the page cannot be written.
    """
    a, b = load_run(run_a), load_run(run_b)
    sheets = comparison_sheets(a, b, load_run(null) if null else None, limit)
    show_sheets(sheets, console or Console(), html, f"{a.report.run} and {b.report.run}")


def comparison_sheets(a: Run, b: Run, null: Run | None, limit: int) -> Iterator[Sheet]:
    """The tables of a comparison, in the order they are shown."""
    yield _runs_sheet(a, b, null)
    yield from _completion_sheets(a, b, limit)
    yield _figures_sheet(a, b)
    yield _crossed_rules_sheet(a, b)
    if null:
        yield _null_sheet(a, b, null)


def _runs_sheet(a: Run, b: Run, null: Run | None) -> Sheet:
    named = [("A", a), ("B", b), *([("C, the null run", null)] if null else [])]
    remarks = [
        f"{name} differs from A in {', '.join(differing)} besides the constitution, which may explain differences."
        for name, run in named[1:]
        if (differing := differing_settings(a, run))
    ]
    rows = tuple((name, str(run.directory), run.constitution_key, str(run.report.prompts)) for name, run in named)
    return Sheet("runs", ("", "folder", "constitution", "prompts"), rows, tuple(remarks), labels=4)


def _completion_sheets(a: Run, b: Run, limit: int) -> Iterator[Sheet]:
    policies = shared_policies(a, b)
    prompts: dict[str, tuple[Conversation, list[tuple[str, str, str]]]] = {}
    for policy in policies:
        for one, other in paired(policy, a, b):
            rows = prompts.setdefault(one.prompt_id, (one.prompt, []))[1]
            rows.append((policy, one.completion, other.completion))
    for prompt, rows in list(prompts.values())[:limit]:
        yield Sheet(conversation_text(prompt), ("policy", "A", "B"), tuple(rows), labels=3)


def _figures_sheet(a: Run, b: Run) -> Sheet:
    rows = tuple(_figure_cells(each) for each in compared_figures(a, b))
    remarks = (
        "Intervals are 95%. B - A is paired by prompt.",
        "Win rate and reward come from each run's own judge and reward model, so no difference is shown.",
    )
    return Sheet("figures", ("policy", "figure", "A", "B", "B - A"), rows, remarks, labels=2)


def _figure_cells(each: ComparedFigure) -> tuple[str, ...]:
    if each.is_share:
        texts = share_text(each.a), share_text(each.b), share_difference_text(each.difference)
    else:
        texts = number_text(each.a), number_text(each.b), number_text(each.difference, "+.2f")
    return each.policy, each.figure, *texts


def _crossed_rules_sheet(a: Run, b: Run) -> Sheet:
    title = "each policy under the rules of both constitutions: mean share of rules that a completion follows"
    columns = ("policy", f"A's rules ({a.constitution_key})", f"B's rules ({b.constitution_key})")
    table = crossed_rules(a, b)
    if not table:
        return Sheet(title, columns, (), ("No table of policies by constitutions: " + _why_no_table(a, b),))
    rows = tuple(
        (f"{crossed.policy} of {name}", *(share_text(cell) for cell in cells))
        for crossed in table
        for name, cells in zip("AB", crossed.cells, strict=True)
    )
    return Sheet(title, columns, rows, tuple(map(_diagonal_remark, table)))


def _why_no_table(a: Run, b: Run) -> str:
    without = [f"{run.report.run} ({run.constitution_key})" for run in (a, b) if not run.checked]
    if without:
        return f"no principle has a rule in {' and '.join(without)}."
    return "the rules apply to no prompt of a trained policy that both runs have."


def _diagonal_remark(crossed: CrossedRules) -> str:
    under_a, under_b = (share_difference_text(gain).replace("\n", " ") for gain in crossed.gains)
    verdict = "follows" if crossed.diagonal_wins else "is not shown to follow"
    return (
        f"{crossed.policy}: each run's policy {verdict} its own rules better than the other's policy does "
        f"(on A's rules by {under_a}, on B's rules by {under_b})."
    )


def _null_sheet(a: Run, b: Run, null: Run) -> Sheet:
    moves = against_null(a, b, null)
    rows: list[tuple[str, ...]] = []
    for each in moves:
        shares = (share_text(each.a), share_difference_text(each.to_b), share_difference_text(each.to_c))
        rows.append((each.policy, each.principle, *shares, "yes" if each.beyond_null else "no"))
    beyond = sum(each.beyond_null for each in moves)
    remark = f"For {beyond} of {len(moves)} shares, the whole interval of B - A is further from 0 than that of C - A."
    columns = ("policy", "rule", "A", "B - A", "C - A", "B moved further")
    return Sheet("compared with null run C", columns, tuple(rows), (remark,), labels=2)
