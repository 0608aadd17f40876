"""`align overoptimisation RUN`: proxy and gold reward by distance from the SFT policy, as tables, JSON and a plot.

align overoptimisation runs/overoptimisation/style-asking-0a1b2c3d
"""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from align.cli.output import show_sheets
from align.errors import InputError
from align.evaluation.overoptimisation import REWARDS, Coefficient
from align.evaluation.overoptimisation_plot import draw, require_matplotlib
from align.evaluation.overoptimisation_study import Curve, Study, load_study
from align.figures.tables import Sheet, print_written
from align.run.artefacts import write_json

STEM = "overoptimisation"
SHOWN_POINTS = 12


def print_study(
    run: Path, gold: str | None = None, plot: Path | None = None, with_plot: bool = True, console: Console | None = None
) -> None:
    """Print a finished run's curves and their fits, and write them with a plot into the run's folder.

    Args:
        gold: the name of the gold reward source, if the recipe has several.
        plot: where to write the plot; by default an SVG in the run's folder.

    Raises:
        InputError: `load_study` refuses the run, a file cannot be written, or matplotlib is missing.
    """
    if with_plot:
        require_matplotlib()
    study = load_study(run, gold)
    console = console or Console()
    show_sheets(study_sheets(study), console)
    written = [run / f"{STEM}.json"]
    _write(written[0], study_json(study))
    if with_plot:
        written.append(plot or run / f"{STEM}.svg")
        draw(study, written[-1])
    for path in written:
        print_written(path, console)


def study_sheets(study: Study) -> Iterator[Sheet]:
    """The tables of a study, in the order they are shown."""
    sizes = {"best-of-n": f"{study.prompts} held-out prompts, {study.candidates} completions each", "ppo": "rollouts"}
    yield from (_curve_sheet(curve, f"{curve.name}: {sizes[curve.name]}") for curve in study.curves)
    yield _fits_sheet(study)


def study_json(study: Study) -> dict[str, Any]:
    """The content of the tables, and every point of the curves."""
    return {
        "run": study.run,
        "rewards": {"proxy": study.proxy, "gold": study.gold},
        "sft": {name: asdict(moments) for name, moments in study.sft.items()},
        "prompts": study.prompts,
        "candidates": study.candidates,
        "unscored": dict(study.unscored),
        "sampled_differently": list(study.sampled_differently),
        "curves": {
            curve.name: {
                "law": curve.law.formula,
                "fits": {name: asdict(fit) for name, fit in curve.fits.items()},
                "points": [_point(curve, index) for index in range(len(curve.steps))],
            }
            for curve in study.curves
        },
    }


def _point(curve: Curve, index: int) -> dict[str, float]:
    points = curve.points
    columns = {"kl": points.kl, "d": points.d, "proxy": points.proxy, "gold": points.gold}
    return {curve.step: curve.steps[index], **{name: float(column[index]) for name, column in columns.items()}}


def _curve_sheet(curve: Curve, title: str) -> Sheet:
    last = len(curve.steps) - 1
    shown = sorted({round(index * last / (SHOWN_POINTS - 1)) for index in range(SHOWN_POINTS)})
    remarks = [_peak_and_end(curve)]
    if len(shown) <= last:
        remarks.append(f"{len(shown)} of {last + 1} points are shown; the JSON file has them all.")
    rows = tuple(_point_cells(curve, index) for index in shown)
    return Sheet(title, (curve.step, "KL (nats)", "d = √KL", "proxy", "gold"), rows, tuple(remarks))


def _point_cells(curve: Curve, index: int) -> tuple[str, ...]:
    step, *numbers = _point(curve, index).values()
    return str(step), *(f"{number:.2f}" for number in numbers)


def _peak_and_end(curve: Curve) -> str:
    """Where the gold reward peaked, and where it ended."""
    highest, last = (_point(curve, index) for index in (int(curve.points.gold.argmax()), -1))
    return (
        f"Gold is highest at {curve.step} {highest[curve.step]} (d {highest['d']:.2f}): {highest['gold']:+.2f}; "
        f"it ends at {last['gold']:+.2f} (d {last['d']:.2f}), with the proxy at {last['proxy']:+.2f}."
    )


def _fits_sheet(study: Study) -> Sheet:
    columns = ("", "reward", "R(d)", "α", "β", "R²", "d at the peak")
    rows = tuple(_fit_cells(curve, name) for curve in study.curves for name in REWARDS)
    return Sheet(f"{study.run}: fits", columns, rows, _remarks(study), labels=3)


def _fit_cells(curve: Curve, name: str) -> tuple[str, ...]:
    fit = curve.fits[name]
    coefficients = (_coefficient_text(each) for each in (fit.alpha, fit.beta))
    return curve.name, name, curve.law.formula, *coefficients, f"{fit.r_squared:.2f}", _peak_text(curve, name)


def _coefficient_text(coefficient: Coefficient) -> str:
    return f"{coefficient.value:.2f}\n[{coefficient.low:.2f}, {coefficient.high:.2f}]"


def _peak_text(curve: Curve, name: str) -> str:
    peak = curve.fits[name].peak
    if peak is None:
        return "none"
    return f"{peak:.2f}" + ("\nnot reached" if peak > curve.points.d.max() else "")


def _remarks(study: Study) -> tuple[str, ...]:
    remarks = [
        f"Proxy: {study.proxy}. Gold: {study.gold}, never trained against. R is the mean reward minus the SFT policy's,"
        " in standard deviations of the rewards of the SFT policy's completions. Intervals are 95%, over prompts.",
        "The KL of best-of-n is its bound log n - (n - 1)/n; that of PPO is estimated from its rollouts (k1).",
    ]
    if any(study.unscored.values()):
        counts = ", ".join(f"{count} by {name}" for name, count in study.unscored.items())
        remarks.append(f"Candidates without a score, which count as the mean of the others: {counts}.")
    if study.sampled_differently:
        settings = ", ".join(study.sampled_differently)
        remarks.append(f"`ppo` and `evaluate` sample with different {settings}, so the curves start apart.")
    return tuple(remarks)


def _write(path: Path, value: dict[str, Any]) -> None:
    try:
        write_json(path, value)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None
