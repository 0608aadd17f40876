"""`align judge calibrate`: the judge's soft labels beside the preferences of people, as tables, JSON and plot.

align judge calibrate --recipe recipes/constitutional-server.yaml --pairs Anthropic/hh-rlhf --limit 200
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from align.constitution.constitution import Constitution, load_constitution
from align.data.pairs import read_pairs
from align.errors import InputError
from align.feedback.calibration import calibration_figures, calibration_sheets
from align.feedback.human_pairs import judge_pairs
from align.feedback.judge import open_judge
from align.figures.calibration_plot import draw_reliability
from align.figures.plots import can_plot, require_matplotlib
from align.figures.tables import print_sheet, print_written
from align.pipeline.plan import model_digest
from align.pipeline.recipe import Recipe
from align.records import PreferencePair, digest, write_rows
from align.run.artefacts import json_text, write_option_file
from align.run.reproducibility import derive_seed
from align.settings.blocks import JudgeBlock, ModelBlock, PairSource

FOLDER = Path("runs/calibration")


@dataclass(frozen=True)
class Tested:
    """A judge that is to be tested: what a recipe says of it, or the command line."""

    judge: JudgeBlock
    model: ModelBlock
    constitution: Constitution
    pairs: tuple[PairSource, ...]
    seed: int = 0
    draws: bool = False


def of_recipe(recipe: Recipe) -> Tested:
    """The judge of a recipe, with the pairs of its `compare.calibration`.

    Raises:
        InputError: the recipe names no constitution or no model.
    """
    model, compare = recipe.shared["model"], recipe.settings.get("compare")
    if recipe.constitution is None or model is None:
        raise InputError(f"{recipe.path}: needs a `constitution` and a `model` to judge by; add them")
    calibration = getattr(compare, "calibration", None)
    return Tested(
        judge=recipe.shared["judge"],
        model=model,
        constitution=recipe.constitution,
        pairs=calibration.human if calibration else (),
        seed=recipe.seed,
        draws=getattr(compare, "principle", "all") == "draw",
    )


def of_options(constitution: str | None, model: str | None, kind: str | None) -> Tested:
    """The judge that the command line names, all else as a recipe has it by default.

    Raises:
        InputError: too little is named, or the constitution has faults.
    """
    block = JudgeBlock.model_validate({"kind": kind} if kind else {})
    if constitution is None or (model is None and block.kind != "rule"):
        raise InputError("which judge? Give --recipe FILE, or --constitution FILE with --model MODEL (or --kind rule)")
    return Tested(block, ModelBlock(path=model or ""), load_constitution(constitution), ())


def main(
    tested: Tested,
    output: Path | None = None,
    plot: Path | None = None,
    json: Path | None = None,
    console: Console | None = None,
) -> None:
    """Ask the judge about every pair, show how far it agrees with people, and write the figures and a plot.

    Args:
        output: the folder of the results, and of what was scored so far: the same command goes on from there.
        plot: where the plot goes; without it into the folder, where matplotlib is installed.
        json: where the figures go, if not into the folder.

    Raises:
        InputError: no pairs, or a file cannot be read or written.
    """
    if plot:
        require_matplotlib("--plot out")
    if not tested.pairs:
        raise InputError("which pairs? Give --pairs FILE, or `compare.calibration.human` in the recipe")
    console = console or Console()
    counts: Counter[str] = Counter()
    pairs = _gathered(tested.pairs, counts)
    folder = output or FOLDER / _folder_name(tested, pairs)
    folder.mkdir(parents=True, exist_ok=True)
    seed = derive_seed(tested.seed, "compare")
    draw_seed = seed if tested.draws else None
    judge = open_judge(tested.judge, tested.model, tested.constitution, draw_seed=draw_seed, seed=seed)
    judged = judge_pairs(judge, pairs, folder / "verdicts.journal")
    write_rows(folder / "judged.jsonl", judged)
    figures = calibration_figures(judged, tested.judge.min_margin)
    title = f"{judge.name}, {tested.constitution.id}"
    for sheet in calibration_sheets(figures, title):
        print_sheet(sheet, console)
    written = [json or folder / "calibration.json"]
    sources = [source.model_dump(mode="json") for source in tested.pairs]
    left_out = {name: count for name, count in counts.items() if count}
    found = {"judge": judge.name, "sources": sources, "left_out": left_out, **figures}
    write_option_file(written[0], json_text(found), "--json")
    if figures["decided"] and (plot or can_plot()):
        written.append(plot or folder / "reliability.svg")
        draw_reliability(figures, title, written[-1])
    for path in (*written, folder / "judged.jsonl"):
        print_written(path, console)


def _gathered(sources: Sequence[PairSource], counts: Counter[str]) -> list[PreferencePair]:
    """The pairs of all sources, each content once."""
    pairs = {pair.id: pair for source in sources for pair in read_pairs(source, counts)}
    return list(pairs.values())


def _folder_name(tested: Tested, pairs: Sequence[PreferencePair]) -> str:
    """A folder for one judge and one set of pairs: scores of another would be taken for this one's."""
    model = tested.judge.engine.model or tested.model.path
    asked: list[Any] = [tested.judge.model_dump(mode="json"), tested.model.model_dump(mode="json"), model_digest(model)]
    asked += [tested.constitution.digest, tested.draws and tested.seed, [pair.id for pair in pairs]]
    return f"{tested.constitution.id}-{tested.judge.kind}-{digest(asked, 8)}"
