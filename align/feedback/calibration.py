"""Compares a judge's soft labels with people's: accuracy, calibration, and baselines that use only position or length.

A pair's `confidence` is the probability, in (0.5, 1], that the judge gives to the completion it prefers; the outcome is
whether people prefer that completion too. This is the top-label calibration of Guo et al. 2017 (arXiv 1706.04599) for
two classes. It does not depend on which completion is called A.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from rich.console import Console

from align.figures.statistics import (
    Estimate,
    clustered_wilson_estimate,
    expected_calibration_error,
    reliability_bins,
    wilson_interval,
)
from align.figures.tables import Sheet, print_sheet
from align.records import Row
from align.run.artefacts import read_manifest

RELIABILITY_BINS = 5
EPSILON = 1e-6
"""Probabilities are clipped to this distance from 0 and 1 before a logarithm is taken."""
NORMAL_95 = 1.959964
MAX_SLOPE = 1024.0
"""Slopes are searched for up to this value. Labels that are always right have no finite slope."""
SIMULATIONS = 200


@dataclass(frozen=True)
class JudgedPair(Row):
    """The judge's verdict on a pair that people labelled. Lengths are in characters.

    `label` is people's probability that `chosen` is better. `p_chosen` is the judge's, None where it decided nothing;
    `reason` then says why. `chosen_first` says whether the judge saw `chosen` as A.
    """

    id: str
    prompt_id: str
    label: float
    p_chosen: float | None
    chosen_first: bool
    chosen_characters: int
    rejected_characters: int
    p_by_principle: dict[str, float] = field(default_factory=dict)
    position_bias: float = 0.0
    same_place: bool = False
    reason: str = ""
    source: str = "human"
    category: str = ""


def calibration_figures(judged: Sequence[JudgedPair], margin: float = 0.0) -> dict[str, Any]:
    """All figures of a judge, as JSON values. Calibration is measured on the pairs it decided, since these get labels.

    Args:
        margin: a principle's probability counts as undecided if it is this close to one half.
    """
    decided = [pair for pair in judged if pair.p_chosen is not None]
    return {
        "pairs": len(judged),
        "prompts": len({pair.prompt_id for pair in judged}),
        "decided": len(decided),
        "undecided": dict(sorted(Counter(pair.reason for pair in judged if pair.p_chosen is None).items())),
        "accuracy": _accuracy(decided),
        "accuracy_undecided_half": _accuracy(judged),
        "accuracy_by_source": {
            source: _accuracy([pair for pair in decided if pair.source == source])
            for source in sorted({pair.source for pair in decided})
        },
        "baselines": {
            "first": _share(judged, [float(pair.chosen_first) for pair in judged]),
            "shorter": _share(judged, [_win(pair.rejected_characters, pair.chosen_characters) for pair in judged]),
            "longer": _share(judged, [_win(pair.chosen_characters, pair.rejected_characters) for pair in judged]),
        },
        **_position_figures(judged),
        **(_label_figures(decided) if decided else {}),
        "by_principle": _by_principle(judged, margin),
    }


def calibration_slope(confidences: ArrayLike, agreed: ArrayLike) -> Estimate | None:
    """The factor for the log-odds at which the labels fit the outcomes best (Cox 1958), with its Wald interval.

    1 for calibrated labels, less for overconfident ones, 0 for uninformative ones. Its inverse is the temperature of
    Guo et al. 2017, section 4. It is the maximum-likelihood slope of a logistic model without an intercept, found by
    bisection. None if there is no maximum: all log-odds are 0, or the labels are always right or always wrong.

    Args:
        confidences: (N,) in [0, 1].
        agreed: (N,) outcomes, in [0, 1].
    """
    p = np.clip(np.asarray(confidences, dtype=np.float64), EPSILON, 1 - EPSILON)
    log_odds, outcomes = np.log(p / (1 - p)), np.asarray(agreed, dtype=np.float64)

    def gradient(slope: float) -> float:
        return float(log_odds @ (outcomes - _sigmoid(slope * log_odds)))

    low, high = -MAX_SLOPE, MAX_SLOPE
    if not gradient(low) > 0 > gradient(high):
        return None
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if gradient(middle) > 0 else (low, middle)
    fitted = _sigmoid(low * log_odds)
    error = float(log_odds**2 @ (fitted * (1 - fitted))) ** -0.5
    return Estimate(low, low - NORMAL_95 * error, low + NORMAL_95 * error, len(log_odds))


def error_if_calibrated(confidences: ArrayLike) -> float:
    """The mean calibration error that perfectly calibrated labels of these confidences would show.

    In a finite sample the error is never 0 (Widmann et al. 2019). One no larger than this is no sign of miscalibration.
    """
    p = np.asarray(confidences, dtype=np.float64)
    generator = np.random.default_rng(0)
    errors = [expected_calibration_error(p, generator.random(len(p)) < p) for _ in range(SIMULATIONS)]
    return float(np.mean(errors))


def equal_mass_edges(confidences: ArrayLike, bins: int) -> list[float]:
    """Edges of bins that hold equally many values each (Nixon et al. 2019); fewer bins if values repeat."""
    edges = np.unique(np.quantile(np.asarray(confidences, dtype=np.float64), np.linspace(0, 1, bins + 1)))
    return [float(edge) for edge in edges] if len(edges) > 1 else [0.0, 1.0]


def _label_figures(decided: Sequence[JudgedPair]) -> dict[str, Any]:
    """How well the judge's confidences match the outcomes."""
    p = np.array([pair.p_chosen for pair in decided], dtype=np.float64)
    labels = np.array([pair.label for pair in decided])
    confidences, agreed = np.maximum(p, 1 - p), np.where(p > 0.5, labels, 1 - labels)
    clipped = np.clip(confidences, EPSILON, 1 - EPSILON)
    edges = equal_mass_edges(confidences, RELIABILITY_BINS)
    slope = calibration_slope(confidences, agreed)
    return {
        "mean_confidence": float(confidences.mean()),
        "brier": float(((confidences - agreed) ** 2).mean()),
        "log_loss": float(-(agreed * np.log(clipped) + (1 - agreed) * np.log(1 - clipped)).mean()),
        "expected_calibration_error": expected_calibration_error(confidences, agreed),
        "expected_calibration_error_equal_mass": expected_calibration_error(confidences, agreed, edges),
        "expected_calibration_error_if_calibrated": error_if_calibrated(confidences),
        "slope": asdict(slope) if slope else None,
        "reliability": [
            {**asdict(each), "interval": wilson_interval(each.share * each.count, each.count)}
            for each in reliability_bins(confidences, agreed, edges)
        ],
    }


def _position_figures(judged: Sequence[JudgedPair]) -> dict[str, float]:
    """How much position matters, over the pairs on which the judge gave any opinion.

    `same_place` is the share of pairs for which the same position is preferred in both orders: in the mean over the
    principles, position weighs more there than the completions do.
    """
    seen = [pair for pair in judged if pair.p_by_principle]
    names = ("position_bias", "same_place")
    return {name: float(np.mean([getattr(pair, name) for pair in seen])) if seen else 0.0 for name in names}


def _by_principle(judged: Sequence[JudgedPair], margin: float) -> dict[str, Any]:
    """The accuracy of each principle by itself, on the pairs that it decides."""
    names = sorted({name for pair in judged for name in pair.p_by_principle})
    found = {}
    for name in names:
        decided = [pair for pair in judged if abs(pair.p_by_principle.get(name, 0.5) - 0.5) > margin]
        asked = sum(name in pair.p_by_principle for pair in judged)
        found[name] = {"asked": asked, **_share(decided, [_win(pair.p_by_principle[name], 0.5) for pair in decided])}
    return found


def _accuracy(pairs: Sequence[JudgedPair]) -> dict[str, Any]:
    return _share(pairs, [_win(pair.p_chosen, 0.5) for pair in pairs])


def _share(pairs: Sequence[JudgedPair], right: Sequence[float]) -> dict[str, Any]:
    """The share with its interval, clustered by prompt; one half with the interval [0, 1] if there are no pairs."""
    estimate = Estimate(0.5, 0.0, 1.0, 0)
    if pairs:
        estimate = clustered_wilson_estimate(right, [pair.prompt_id for pair in pairs])
    return asdict(estimate)


def _win(first: float | None, second: float) -> float:
    """1 if the first is larger, 0 if the second is, one half if they are equal or the first is unknown."""
    return 0.5 if first is None or first == second else float(first > second)


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(-np.logaddexp(0, -x))


def calibration_sheets(figures: Mapping[str, Any], title: str) -> list[Sheet]:
    """The figures as tables: accuracy with the baselines, reliability by bin, and the accuracy of each principle."""
    sheets = [_accuracy_sheet(figures, title)]
    if figures["decided"]:
        sheets.append(_reliability_sheet(figures))
    if len(figures["by_principle"]) > 1:
        sheets.append(_principle_sheet(figures["by_principle"]))
    return sheets


def print_calibration(figures: Mapping[str, Any], title: str, console: Console | None = None) -> None:
    """Print the figures of a judge."""
    for sheet in calibration_sheets(figures, title):
        print_sheet(sheet, console or Console())


def print_published_calibration(directory: Path, console: Console | None = None) -> None:
    """Print the calibration figures in a folder that `compare` published, if there are any."""
    manifest = read_manifest(directory)
    if manifest is not None and "calibration" in manifest.figures:
        title = f"{directory.parent.parent.name}/{directory.parent.name}, judge of compare"
        print_calibration(manifest.figures["calibration"], title, console)


def _accuracy_sheet(figures: Mapping[str, Any], title: str) -> Sheet:
    by_source, baselines = figures["accuracy_by_source"], figures["baselines"]
    rows = [
        ("the judge, on pairs it decides", figures["accuracy"]),
        *((f"  on {source} pairs", found) for source, found in by_source.items() if len(by_source) > 1),
        ("the judge, undecided counted as half", figures["accuracy_undecided_half"]),
        ("always A", baselines["first"]),
        ("always the shorter answer", baselines["shorter"]),
        ("always the longer answer", baselines["longer"]),
    ]
    return Sheet(
        f"{title}: {figures['pairs']} pairs of {figures['prompts']} prompts",
        ("agrees with people", "pairs", "share", "95% interval"),
        tuple((name, str(found["n"]), *_cells(found)) for name, found in rows),
        tuple(_accuracy_remarks(figures)),
    )


def _accuracy_remarks(figures: Mapping[str, Any]) -> list[str]:
    undecided = ", ".join(f"{reason} {count}" for reason, count in figures["undecided"].items())
    remarks = [f"undecided: {undecided}"] if undecided else []
    if figures["position_bias"]:
        remarks.append(
            f"Position: the completion shown first gets {0.5 + figures['position_bias']:.0%} of the probability; the "
            f"same position is preferred in both orders for {figures['same_place']:.0%} of the pairs."
        )
    return remarks


def _reliability_sheet(figures: Mapping[str, Any]) -> Sheet:
    rows = tuple(
        (
            f"{100 * each['low']:.1f}-{100 * each['high']:.1f}%",
            str(each["count"]),
            f"{each['mean_probability']:.1%}",
            *_cells({"mean": each["share"], "low": each["interval"][0], "high": each["interval"][1]}),
        )
        for each in figures["reliability"]
    )
    return Sheet(
        "how sure the judge is, and how often people agree (bins with equally many pairs)",
        ("judge's probability", "pairs", "mean", "people agree", "95% interval"),
        rows,
        (
            f"Calibration error {figures['expected_calibration_error']:.3f} in ten bins of equal width (Guo et al. "
            f"2017), {figures['expected_calibration_error_equal_mass']:.3f} in the bins above; calibrated labels would "
            f"show {figures['expected_calibration_error_if_calibrated']:.3f} on as many pairs.",
            f"Brier score {figures['brier']:.3f} (coin flips: 0.25), log loss {figures['log_loss']:.3f} (0.693).",
            _slope_text(figures["slope"]),
        ),
    )


def _slope_text(slope: Mapping[str, float] | None) -> str:
    if slope is None:
        return "Slope of the log-odds: none, since the labels are always right or always wrong."
    interval = f"{slope['mean']:.2f} [{slope['low']:.2f}, {slope['high']:.2f}]"
    return f"Slope of the log-odds {interval} (1: calibrated; less: overconfident; 0: uninformative)."


def _principle_sheet(by_principle: Mapping[str, Mapping[str, Any]]) -> Sheet:
    ranked = sorted(by_principle.items(), key=lambda item: (-item[1]["mean"], item[0]))
    rows = tuple((name, str(found["asked"]), str(found["n"]), *_cells(found)) for name, found in ranked)
    chance = len(rows) / 20
    return Sheet(
        "each principle by itself",
        ("principle", "asked", "decided", "people agree", "95% interval"),
        rows,
        (f"Of {len(rows)} such intervals, about {chance:.1f} exclude 50% by chance alone.",),
    )


def _cells(found: Mapping[str, float]) -> tuple[str, str]:
    return f"{found['mean']:.0%}", f"[{100 * found['low']:.0f}, {100 * found['high']:.0f}]"
