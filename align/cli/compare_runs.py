"""`align compare-runs RUN_A RUN_B`: completions side by side, figures and differences, who follows whose rules.

    align compare-runs runs/quickstart/style-asking-0a1b2c3d runs/quickstart/style-telling-4e5f6a7b \\
        --null runs/quickstart/style-asking-paraphrased-8c9d0e1f --html comparison.html
"""

from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from align.evaluation.report import number_text, share_difference_text, share_text
from align.figures.tables import Sheet, conversation_text, page, print_sheet, print_written
from align.records import Conversation
from align.results.run_comparison import (
    Compared,
    Cross,
    Run,
    against_null,
    compared_figures,
    cross_table,
    load_run,
    paired,
    shared_policies,
    unlike_settings,
)
from align.run.artefacts import write_option_file


def main(
    run_a: Path,
    run_b: Path,
    limit: int = 5,
    html: Path | None = None,
    null: Path | None = None,
    console: Console | None = None,
) -> None:
    """Print the comparison of two evaluated runs, and write it as a page where `html` says.

    Args:
        limit: prompts whose completions are shown.
        null: a run that should not differ from `run_a` (its constitution in other words, or another seed): its
            differences are shown beside those of `run_b`.

    Raises:
        InputError: a run has not been evaluated, they have nothing in common, or the page cannot be written.
    """
    a, b = load_run(run_a), load_run(run_b)
    sheets = list(comparison_sheets(a, b, load_run(null) if null else None, limit))
    console = console or Console()
    for sheet in sheets:
        print_sheet(sheet, console)
    if html:
        write_option_file(html, page(f"{a.report.run} beside {b.report.run}", sheets), "--html")
        print_written(html, console)


def comparison_sheets(a: Run, b: Run, null: Run | None, limit: int) -> Iterator[Sheet]:
    """The parts of a comparison, in the order they are shown."""
    yield _runs_sheet(a, b, null)
    yield from _completion_sheets(a, b, limit)
    yield _figures_sheet(a, b)
    yield _cross_sheet(a, b)
    if null:
        yield _null_sheet(a, b, null)


def _runs_sheet(a: Run, b: Run, null: Run | None) -> Sheet:
    named = [("A", a), ("B", b), *([("C, the null run", null)] if null else [])]
    remarks = [
        f"{name} differs from A in {', '.join(unlike)} besides the constitution: differences may come from there."
        for name, run in named[1:]
        if (unlike := unlike_settings(a, run))
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
        "Intervals are 95%; B - A is paired by prompt.",
        "Each run's own judge and reward model gave its win rate and reward, so these have no difference.",
    )
    return Sheet("figures", ("policy", "figure", "A", "B", "B - A"), rows, remarks, labels=2)


def _figure_cells(each: Compared) -> tuple[str, ...]:
    if each.is_share:
        texts = share_text(each.a), share_text(each.b), share_difference_text(each.difference)
    else:
        texts = number_text(each.a), number_text(each.b), number_text(each.difference, "+.2f")
    return each.policy, each.figure, *texts


def _cross_sheet(a: Run, b: Run) -> Sheet:
    title = "policies under both constitutions' rules: mean share of the rules that a completion follows"
    columns = ("policy", f"A's rules ({a.constitution_key})", f"B's rules ({b.constitution_key})")
    crosses = cross_table(a, b)
    if not crosses:
        return Sheet(title, columns, (), ("No table of policies × constitutions: " + _why_no_cross(a, b),))
    rows = tuple(
        (f"{cross.policy} of {name}", *(share_text(cell) for cell in cells))
        for cross in crosses
        for name, cells in zip("AB", cross.cells, strict=True)
    )
    return Sheet(title, columns, rows, tuple(map(_cross_statement, crosses)))


def _why_no_cross(a: Run, b: Run) -> str:
    without = [f"{run.report.run} ({run.constitution_key})" for run in (a, b) if not run.checked]
    if without:
        return f"no principle with a rule in {' and '.join(without)}."
    return "no trained policy in both runs whose prompts the rules apply to."


def _cross_statement(cross: Cross) -> str:
    under_a, under_b = (share_difference_text(gain).replace("\n", " ") for gain in cross.gains)
    verdict = "wins beyond its intervals" if cross.diagonal_wins else "does not win beyond its intervals"
    return f"{cross.policy}: the diagonal {verdict} (A's policy on A's rules {under_a}, B's policy on B's {under_b})."


def _null_sheet(a: Run, b: Run, null: Run) -> Sheet:
    moves = against_null(a, b, null)
    rows = tuple(
        (
            each.policy,
            each.principle,
            share_text(each.a),
            share_difference_text(each.to_b),
            share_difference_text(each.to_c),
            "yes" if each.beyond_null else "no",
        )
        for each in moves
    )
    beyond = sum(each.beyond_null for each in moves)
    remark = f"{beyond} of {len(moves)} shares moved further to B, by their whole interval, than C's interval reaches."
    return Sheet(
        "beside the null run C", ("policy", "rule", "A", "B - A", "C - A", "B moved further"), rows, (remark,), labels=2
    )
