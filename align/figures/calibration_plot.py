"""The reliability diagram of a judge: its confidence, and how often people agree (Guo et al. 2017, figure 1)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from align.figures.plots import STYLE, require_matplotlib, save_figure

COLOUR = "#1f6fb4"
GREY = "#888888"


def draw_reliability(figures: Mapping[str, Any], title: str, path: Path) -> None:
    """Plot a judge's figures to a file, in the format of its suffix.

    Raises:
        InputError: matplotlib is missing or does not know the format, or the file cannot be written.
    """
    require_matplotlib("--plot out")
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 4.2), layout="constrained")
        panel = figure.subplots()
        panel.plot([0.5, 1], [0.5, 1], color=GREY, linewidth=0.8, label="calibrated")
        panel.axhline(0.5, color=GREY, linewidth=0.8, linestyle=":", label="chance")
        _draw_bins(panel, figures["reliability"])
        panel.set_xlim(0.5, 1)
        panel.set_ylim(0, 1)
        panel.set_xlabel("the judge's probability that the answer it prefers is better")
        panel.set_ylabel("share for which people agree, 95% intervals")
        panel.set_title(title, fontsize=9)
        panel.legend(frameon=False, loc="lower right")
        save_figure(figure, path)


def _draw_bins(panel: Any, bins: list[Mapping[str, Any]]) -> None:
    means, shares = (np.array([each[key] for each in bins]) for key in ("mean_probability", "share"))
    ends = np.array([each["interval"] for each in bins])
    # At a share of 1, rounding can leave the interval's end just below it.
    errors = np.maximum(0, [shares - ends[:, 0], ends[:, 1] - shares])
    label = f"the judge, {sum(each['count'] for each in bins)} pairs"
    panel.errorbar(means, shares, errors, fmt="o", color=COLOUR, markersize=4, capsize=2, label=label)
