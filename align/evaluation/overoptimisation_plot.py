"""The plot of an over-optimisation study: a panel for each way to optimise, with its points and the fitted laws."""

from pathlib import Path
from typing import Any

import numpy as np

from align.evaluation.overoptimisation import REWARDS
from align.evaluation.overoptimisation_study import Curve, Study
from align.figures import plots

COLOURS = {"proxy": "#d98a00", "gold": "#1f6fb4"}
MARKERS = {"proxy": "o", "gold": "s"}


def require_matplotlib() -> None:
    """Check that matplotlib is installed.

    Raises:
        InputError: it is missing; the message names what to install.
    """
    plots.require_matplotlib("it out with --no-plot")


def draw(study: Study, path: Path) -> None:
    """Write the plot in the format that the path's suffix names.

    Raises:
        InputError: matplotlib is missing or does not know the format, or the file cannot be written.
    """
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(8, 3.4), layout="constrained")
        panels = figure.subplots(1, len(study.curves), sharey=True)
        for panel, curve in zip(panels, study.curves, strict=True):
            _draw_curve(panel, curve)
        panels[0].set_ylabel("reward above SFT's, in its standard deviations")
        panels[-1].legend(frameon=False)
        plots.save_figure(figure, path)


def _draw_curve(panel: Any, curve: Curve) -> None:
    points = curve.points
    distances = np.linspace(0, points.d.max(), 200)
    for name in REWARDS:
        fit, colour = curve.fits[name], COLOURS[name]
        panel.plot(points.d, getattr(points, name), MARKERS[name], color=colour, markersize=3.5, alpha=0.7, label=name)
        panel.plot(distances, curve.law.at(distances, fit.alpha.value, fit.beta.value), color=colour)
    panel.axhline(0, color="#888888", linewidth=0.6)
    panel.set_title(f"{curve.name}: {curve.law.formula}")
    panel.set_xlabel("d = √KL to the SFT policy (√nats)")
