"""`align plan RECIPE`: a table of which stages are done, which are stale and why, and which comes next."""

import shlex

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from align.pipeline.plan import Plan, Step, make_plan
from align.pipeline.recipe import Recipe

STYLES = {"done": "green", "stale": "yellow", "interrupted": "yellow", "missing": "dim"}


def print_plan(recipe: Recipe, console: Console) -> None:
    """Print the state of every stage, and the command that runs the next one."""
    plan = make_plan(recipe)
    following = next((step for step in plan.values() if step.is_runnable), None)
    table = Table(box=None, pad_edge=False)
    for heading in ("stage", "state", "run", "why"):
        table.add_column(heading, overflow="fold")
    for step in plan.values():
        state = f"[{STYLES[step.state]}]{step.state}[/]" + (" (next)" if step is following else "")
        table.add_row(step.stage, state, escape(step.directory.parent.name), escape(step.why))
    folder = recipe.output / recipe.name
    console.print(f"{recipe.path}, in {folder}\n", highlight=False, markup=False, soft_wrap=True)
    console.print(table)
    console.print(f"\n{_advice(recipe, plan, following)}", highlight=False, markup=False, soft_wrap=True)


def _advice(recipe: Recipe, plan: Plan, following: Step | None) -> str:
    if following is None:
        return "Everything is up to date."
    words = ["align", "run", following.stage, "--recipe", str(recipe.path), *recipe.override_options]
    replaced = ", ".join(step.stage for step in plan.values() if step.replaces)
    warning = f"\n`{replaced}` would be trained again: add --force to replace it, or --set name=NAME to keep it"
    return f"Next: {shlex.join(words)}" + (warning if replaced else "")
