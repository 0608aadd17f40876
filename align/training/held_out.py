"""How a reward model scores the pairs that it was not trained on: figures for the manifest, and a table of them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from align.figures.statistics import clustered_share_estimate, expected_calibration_error, reliability_bins
from align.figures.tables import Sheet, print_sheet
from align.records import Row
from align.run.artefacts import read_manifest

HELD_OUT = "held_out.jsonl"


@dataclass(frozen=True)
class ScoredPair(Row):
    """A held-out pair's label, scores and lengths; `probability` is the label, that the chosen completion is better."""

    id: str
    prompt_id: str
    probability: float
    chosen_score: float
    rejected_score: float
    chosen_characters: int
    rejected_characters: int
    source: str
    category: str = ""

    @property
    def margin(self) -> float:
        return self.chosen_score - self.rejected_score

    @property
    def brevity(self) -> int:
        """By how many characters the chosen completion is shorter."""
        return self.rejected_characters - self.chosen_characters


def held_out_figures(scored: Sequence[ScoredPair], seed: int) -> dict[str, Any]:
    """Pair accuracy and the accuracy of length baselines, with 95% intervals; Brier score and calibration.

    Intervals are bootstrapped over prompts, since pairs of one prompt share their completions and are not independent.
    Brier score and calibration take the soft label as the outcome and count each pair in both orders. The chosen
    completion always comes first, so in that order alone full confidence would always be right.
    """
    if not scored:
        return {"accuracy": None}
    margins = np.array([pair.margin for pair in scored])
    labels = np.array([pair.probability for pair in scored])
    predicted = np.exp(-np.logaddexp(0, -np.concatenate([margins, -margins])))
    outcomes = np.concatenate([labels, 1 - labels])
    by_source = {
        source: [pair for pair in scored if pair.source == source]
        for source in sorted({pair.source for pair in scored})
    }
    return {
        "prompts": len({pair.prompt_id for pair in scored}),
        "accuracy": pair_accuracy(scored, margins.tolist(), seed),
        "accuracy_by_source": {
            source: pair_accuracy(own, [pair.margin for pair in own], seed) for source, own in by_source.items()
        },
        "shorter_wins": pair_accuracy(scored, [pair.brevity for pair in scored], seed),
        "longer_wins": pair_accuracy(scored, [-pair.brevity for pair in scored], seed),
        "brier": float(((predicted - outcomes) ** 2).mean()),
        "expected_calibration_error": expected_calibration_error(predicted, outcomes),
        "reliability": [asdict(each) for each in reliability_bins(predicted, outcomes)],
    }


def pair_accuracy(scored: Sequence[ScoredPair], margins: Sequence[float], seed: int) -> dict[str, float]:
    """FaultShare of the margins above zero, a tie counting as one half, with its interval over prompts."""
    right = [1.0 if margin > 0 else 0.5 if margin == 0 else 0.0 for margin in margins]
    return asdict(clustered_share_estimate(right, [pair.prompt_id for pair in scored], seed))


def held_out_sheet(figures: Mapping[str, Any], run: str) -> Sheet:
    """The figures of a reward stage's manifest as a table; only a remark if no pair was held out."""
    if figures.get("accuracy") is None:
        return Sheet(run, ("",), (), (f"{run}: no pair was held out, so the reward model was not tested",))
    by_source = figures["accuracy_by_source"]
    rows = [
        ("reward model", figures["accuracy"]),
        *((f"  on {source} pairs", found) for source, found in by_source.items() if len(by_source) > 1),
        ("the shorter answer", figures["shorter_wins"]),
        ("the longer answer", figures["longer_wins"]),
    ]
    return Sheet(
        f"{run}: {figures['accuracy']['n']} held-out pairs of {figures['prompts']} prompts",
        ("agreement with the label", "pairs", "share", "95% interval"),
        tuple(
            (name, str(found["n"]), f"{found['mean']:.0%}", f"[{100 * found['low']:.0f}, {100 * found['high']:.0f}]")
            for name, found in rows
        ),
        (
            f"Brier score {figures['brier']:.3f} (a coin flip scores 0.25); calibration error "
            f"{figures['expected_calibration_error']:.3f} (0 if pairs predicted at 70% come true in 70% of cases)",
        ),
    )


def print_held_out(figures: Mapping[str, Any], run: str, console: Console | None = None) -> None:
    """Print the figures of a reward stage's manifest."""
    print_sheet(held_out_sheet(figures, run), console or Console())


def print_published_held_out(directory: Path, console: Console | None = None) -> None:
    """Print the figures of a folder that `reward` published; nothing if it published none."""
    manifest = read_manifest(directory)
    if manifest is not None:
        print_held_out(manifest.figures, f"{directory.parent.parent.name}/{directory.parent.name}", console)
