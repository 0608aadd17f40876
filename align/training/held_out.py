"""What a reward model says of the pairs that it was not trained on: figures for a manifest, and a table of them."""

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
    """What the reward model says of a held-out pair; lengths in characters."""

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
        """How much shorter the chosen completion is, in characters."""
        return self.rejected_characters - self.chosen_characters


def held_out_figures(scored: Sequence[ScoredPair], seed: int) -> dict[str, Any]:
    """Pair accuracy with its 95% interval beside the length baselines, Brier score and calibration.

    Intervals are bootstrapped over prompts: pairs of one prompt share their completions and are not independent.
    Brier score and calibration take the soft label as what happened, and each pair both ways round: the chosen
    completion comes first by construction, so that one way alone would always be right to be sure.
    """
    if not scored:
        return {"accuracy": None}
    margins = np.array([pair.margin for pair in scored])
    labels = np.array([pair.probability for pair in scored])
    predicted = np.exp(-np.logaddexp(0, -np.concatenate([margins, -margins])))
    happened = np.concatenate([labels, 1 - labels])
    by_source = {
        source: [pair for pair in scored if pair.source == source]
        for source in sorted({pair.source for pair in scored})
    }
    return {
        "prompts": len({pair.prompt_id for pair in scored}),
        "accuracy": agreement(scored, margins.tolist(), seed),
        "accuracy_by_source": {
            source: agreement(own, [pair.margin for pair in own], seed) for source, own in by_source.items()
        },
        "shorter_wins": agreement(scored, [pair.brevity for pair in scored], seed),
        "longer_wins": agreement(scored, [-pair.brevity for pair in scored], seed),
        "brier": float(((predicted - happened) ** 2).mean()),
        "expected_calibration_error": expected_calibration_error(predicted, happened),
        "reliability": [asdict(each) for each in reliability_bins(predicted, happened)],
    }


def agreement(scored: Sequence[ScoredPair], margins: Sequence[float], seed: int) -> dict[str, float]:
    """Share of the pairs' margins above zero, ties for a half, with its interval over prompts."""
    right = [1.0 if margin > 0 else 0.5 if margin == 0 else 0.0 for margin in margins]
    return asdict(clustered_share_estimate(right, [pair.prompt_id for pair in scored], seed))


def held_out_sheet(figures: Mapping[str, Any], run: str) -> Sheet:
    """The figures of a reward stage's manifest as a table; a remark alone where no pair was held out."""
    if figures.get("accuracy") is None:
        return Sheet(run, ("",), (), (f"{run}: no pair was held out, so nothing tests the reward model",))
    by_source = figures["accuracy_by_source"]
    rows = [
        ("reward model", figures["accuracy"]),
        *((f"  on {source} pairs", found) for source, found in by_source.items() if len(by_source) > 1),
        ("the shorter answer", figures["shorter_wins"]),
        ("the longer answer", figures["longer_wins"]),
    ]
    return Sheet(
        f"{run}: {figures['accuracy']['n']} held-out pairs of {figures['prompts']} prompts",
        ("prefers what the label prefers", "pairs", "share", "95% interval"),
        tuple(
            (name, str(found["n"]), f"{found['mean']:.0%}", f"[{100 * found['low']:.0f}, {100 * found['high']:.0f}]")
            for name, found in rows
        ),
        (
            f"Brier score {figures['brier']:.3f} (a coin has 0.25); calibration error "
            f"{figures['expected_calibration_error']:.3f} (0: of what it says with 70%, 70% happens)",
        ),
    )


def print_held_out(figures: Mapping[str, Any], run: str, console: Console | None = None) -> None:
    """Show the figures of a reward stage's manifest."""
    print_sheet(held_out_sheet(figures, run), console or Console())


def print_published_held_out(directory: Path, console: Console | None = None) -> None:
    """Show the figures in a folder that `reward` published; nothing where there is none."""
    manifest = read_manifest(directory)
    if manifest is not None:
        print_held_out(manifest.figures, f"{directory.parent.parent.name}/{directory.parent.name}", console)
