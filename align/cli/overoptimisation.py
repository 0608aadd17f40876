"""`align overoptimisation RUN`: proxy and gold reward by the distance from the SFT policy, as table, JSON and plot.

align overoptimisation runs/overoptimisation/style-asking-0a1b2c3d
"""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from align.errors import InputError
from align.evaluation.overoptimisation import REWARDS, Coefficient
from align.evaluation.overoptimisation_plot import draw, require_matplotlib
from align.evaluation.overoptimisation_study import Curve, Study, load_study
from align.figures.tables import Sheet, print_sheet, print_written
from align.run.artefacts import write_json

STEM = "overoptimisation"
SHOWN_POINTS = 12


def main(
    run: Path, gold: str | None = None, plot: Path | None = None, with_plot: bool = True, console: Console | None = None
) -> None:
    """Show a finished run's curves and their fits, and write them beside its stages, with a plot.

    Args:
        gold: the gold source's name, where the recipe has several.
        plot: where the plot goes; into the run's folder, as an SVG, unless said otherwise.

    Raises:
        InputError: as for `load_study`, a file cannot be written, or the plot's library is missing.
    """
    if with_plot:
        require_matplotlib()
    study = load_study(run, gold)
    console = console or Console()
    for sheet in study_sheets(study):
        print_sheet(sheet, console)
    written = [run / f"{STEM}.json"]
    _write(written[0], study_json(study))
    if with_plot:
        written.append(plot or run / f"{STEM}.svg")
        draw(study, written[-1])
    for path in written:
        print_written(path, console)


def study_sheets(study: Study) -> Iterator[Sheet]:
    """The parts of a study, in the order they are shown."""
    sizes = {"best-of-n": f"{study.prompts} held-out prompts, {study.candidates} completions each", "ppo": "rollouts"}
    yield from (_curve_sheet(curve, f"{curve.name}: {sizes[curve.name]}") for curve in study.curves)
    yield _fits_sheet(study)


def study_json(study: Study) -> dict[str, Any]:
    """Everything that the tables hold, and every point."""
    return {
        "run": study.run,
        "rewards": {"proxy": study.proxy, "gold": study.gold},
        "sft": {name: asdict(moments) for name, moments in study.sft.items()},
        "prompts": study.prompts,
        "candidates": study.candidates,
        "sampled_differently": list(study.sampled_differently),
        "curves": {
            curve.name: {
                "law": curve.law.formula,
                "fits": {name: asdict(fit) for name, fit in curve.fits.items()},
                "points": [_point(curve, place) for place in range(len(curve.steps))],
            }
            for curve in study.curves
        },
    }


def _point(curve: Curve, place: int) -> dict[str, float]:
    points = curve.points
    columns = {"kl": points.kl, "d": points.d, "proxy": points.proxy, "gold": points.gold}
    return {curve.step: curve.steps[place], **{name: float(column[place]) for name, column in columns.items()}}


def _curve_sheet(curve: Curve, title: str) -> Sheet:
    last = len(curve.steps) - 1
    shown = sorted({round(place * last / (SHOWN_POINTS - 1)) for place in range(SHOWN_POINTS)})
    remarks = [_course(curve)]
    if len(shown) <= last:
        remarks.append(f"{len(shown)} of {last + 1} points are shown; the JSON has them all.")
    rows = tuple(_point_cells(curve, place) for place in shown)
    return Sheet(title, (curve.step, "KL (nats)", "d = √KL", "proxy", "gold"), rows, tuple(remarks))


def _point_cells(curve: Curve, place: int) -> tuple[str, ...]:
    step, *numbers = _point(curve, place).values()
    return str(step), *(f"{number:.2f}" for number in numbers)


def _course(curve: Curve) -> str:
    """Where gold was highest, and where it ended."""
    highest, last = (_point(curve, place) for place in (int(curve.points.gold.argmax()), -1))
    return (
        f"gold is highest at {curve.step} {highest[curve.step]} (d {highest['d']:.2f}): {highest['gold']:+.2f}; "
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
        f"Proxy: {study.proxy}. Gold: {study.gold}, never trained against. R is a mean reward less the SFT policy's, "
        "in standard deviations of its completions' rewards. Intervals are 95%, over prompts.",
        "The KL of best-of-n is its bound log n - (n - 1)/n; PPO's is estimated from its rollouts (k1).",
    ]
    if study.sampled_differently:
        remarks.append(
            f"ppo and evaluate sample with different {', '.join(study.sampled_differently)}: the curves start apart."
        )
    return tuple(remarks)


def _write(path: Path, value: dict[str, Any]) -> None:
    try:
        write_json(path, value)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None
