"""`align judge calibrate`: compares a judge's soft labels with people's preferences, as tables, JSON and a plot.

align judge calibrate --recipe recipes/constitutional-server.yaml --pairs Anthropic/hh-rlhf --limit 200
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from align.cli.output import show_sheets
from align.constitution.constitution import Constitution
from align.constitution.loading import load_constitution
from align.data.pairs import read_pairs
from align.data.sources import Intake
from align.errors import InputError
from align.feedback.calibration import calibration_figures, calibration_sheets
from align.feedback.human_pairs import judge_pairs
from align.feedback.judge import open_judge
from align.figures.calibration_plot import draw_reliability
from align.figures.plots import can_plot, require_matplotlib
from align.figures.tables import print_written
from align.pipeline.plan import model_digest
from align.pipeline.recipe import Recipe
from align.records import PreferencePair, digest, write_rows
from align.run.artefacts import json_text, write_option_file
from align.run.reproducibility import derive_seed
from align.settings.blocks import JudgeBlock, ModelBlock
from align.settings.data import PairSource

FOLDER = Path("runs/calibration")


@dataclass(frozen=True)
class JudgeTest:
    """A judge to test, and the human pairs to test it on."""

    judge: JudgeBlock
    model: ModelBlock
    constitution: Constitution
    pairs: tuple[PairSource, ...]
    seed: int = 0
    draws_principle: bool = False


def judge_of_recipe(recipe: Recipe) -> JudgeTest:
    """The judge of a recipe, with the pairs of its `compare.calibration`.

    Raises:
        InputError: the recipe names no constitution or no model.
    """
    model, compare = recipe.shared["model"], recipe.settings.get("compare")
    if recipe.constitution is None or model is None:
        raise InputError(f"{recipe.path}: needs a `constitution` and a `model` for the judge; add them")
    calibration = getattr(compare, "calibration", None)
    pairs = calibration.human if calibration else ()
    draws_principle = getattr(compare, "principle", "all") == "draw"
    return JudgeTest(recipe.shared["judge"], model, recipe.constitution, pairs, recipe.seed, draws_principle)


def judge_of_options(constitution: str | None, model: str | None, kind: str | None) -> JudgeTest:
    """The judge that the command line names, with the defaults of a recipe for everything else.

    Raises:
        InputError: the constitution or the model is missing, or the constitution is invalid.
    """
    block = JudgeBlock.model_validate({"kind": kind} if kind else {})
    if constitution is None or (model is None and block.kind != "rule"):
        raise InputError("which judge? Give --recipe FILE, or --constitution FILE with --model MODEL (or --kind rule)")
    return JudgeTest(block, ModelBlock(path=model or ""), load_constitution(constitution), ())


def calibrate(
    test: JudgeTest,
    output: Path | None = None,
    plot: Path | None = None,
    json: Path | None = None,
    console: Console | None = None,
) -> None:
    """Ask the judge about every pair, show how well it agrees with people, and write the figures and a plot.

    Args:
        output: the folder for the results and for the scores so far: the same command resumes from them.
        plot: where to write the plot; by default into the folder, if matplotlib is installed.
        json: where to write the figures; by default into the folder.

    Raises:
        InputError: there are no pairs, or a file cannot be read or written.
    """
    if plot:
        require_matplotlib("--plot out")
    if not test.pairs:
        raise InputError("which pairs? Give --pairs FILE, or `compare.calibration.human` in the recipe")
    console = console or Console()
    counts: Counter[str] = Counter()
    pairs = _read_all_pairs(test.pairs, Intake(counts))
    folder = output or FOLDER / _folder_name(test, pairs)
    folder.mkdir(parents=True, exist_ok=True)
    seed = derive_seed(test.seed, "compare")
    draw_seed = seed if test.draws_principle else None
    judge = open_judge(test.judge, test.model, test.constitution, draw_seed=draw_seed, seed=seed)
    judged = judge_pairs(judge, pairs, folder / "verdicts.journal")
    write_rows(folder / "judged.jsonl", judged)
    figures = calibration_figures(judged, test.judge.min_margin)
    title = f"{judge.name}, {test.constitution.id}"
    show_sheets(calibration_sheets(figures, title), console)
    written = [json or folder / "calibration.json"]
    sources = [source.model_dump(mode="json") for source in test.pairs]
    left_out = {name: count for name, count in counts.items() if count}
    content = {"judge": judge.name, "sources": sources, "left_out": left_out, **figures}
    write_option_file(written[0], json_text(content), "--json")
    if figures["decided"] and (plot or can_plot()):
        written.append(plot or folder / "reliability.svg")
        draw_reliability(figures, title, written[-1])
    for path in (*written, folder / "judged.jsonl"):
        print_written(path, console)


def _read_all_pairs(sources: Sequence[PairSource], intake: Intake) -> list[PreferencePair]:
    """The pairs of all sources, without duplicates."""
    pairs = {pair.id: pair for source in sources for pair in read_pairs(source, intake)}
    return list(pairs.values())


def _folder_name(test: JudgeTest, pairs: Sequence[PreferencePair]) -> str:
    """A folder name unique to this judge and these pairs, so that scores of others are never reused for them."""
    model = test.judge.engine.model or test.model.path
    identity: list[Any] = [test.judge.model_dump(mode="json"), test.model.model_dump(mode="json"), model_digest(model)]
    identity += [test.constitution.digest, test.draws_principle and test.seed, [pair.id for pair in pairs]]
    return f"{test.constitution.id}-{test.judge.kind}-{digest(identity, 8)}"
