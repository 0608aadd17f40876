"""Monitors a PPO run once per iteration: raises alarms, shows samples, and decides on an early stop.

The first process decides for all, from its own figures. Its decisions follow from `metrics.jsonl` and the checkpoints
on disk alone, so a resumed run makes the same ones as an uninterrupted run.
"""

import json
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from tqdm import tqdm

from align.figures.tables import Sheet, print_sheet, printable, shortened
from align.records import read_jsonl
from align.rl import checkpoint
from align.rl.alarms import Alarm, WatchedRun, fired
from align.rl.early_stop import Ending, best_checkpoint, ending
from align.rl.metric_history import Row, length_controlled_score
from align.rl.settings import PpoBlock
from align.run import processes
from align.run.tracking import METRICS, Tracker, json_row, truncate_rows

ALARMS = "alarms.jsonl"
SAMPLES_SHOWN = 4
SHOWN_CHARACTERS = 400
SAMPLE_COLUMNS = ("prompt", "completion", "score", "KL", "tokens")


@dataclass(frozen=True)
class Observed:
    """Figures to add to an iteration's own, and how the run ended if this was its last iteration."""

    figures: dict[str, float]
    ending: Ending | None


class Watch:
    """Monitors a run's figures.

    Args:
        gold: names of the gold reward sources, whose scores are only reported.
        output: the stage's folder, with `metrics.jsonl` and the checkpoints; alarms go to `alarms.jsonl` there.
    """

    def __init__(self, settings: PpoBlock, gold: Sequence[str], output: Path, tracker: Tracker) -> None:
        self.settings = settings
        self.gold = tuple(gold)
        self.output = output
        self.tracker = tracker
        self.history: list[Row] = []

    def resume(self, iteration: int) -> Ending | None:
        """Resume after `iteration`; returns how the run ended, if it had ended there. Call in every process."""
        return processes.decide_on_first_rank(lambda: self._resume(iteration))

    def observe(self, iteration: int, figures: Mapping[str, float]) -> Observed:
        """Process the figures of a finished iteration. Call in every process, before they are logged."""
        return processes.decide_on_first_rank(lambda: self._observe(iteration, figures))

    def worth_keeping(self, saved: Sequence[int]) -> Collection[int]:
        """The earlier checkpoint to keep beside the newest: the best one, if the run may roll back to it."""
        block = self.settings.early_stop
        return {best_checkpoint(self.history, saved, block)} if saved and block and block.roll_back else ()

    def show_samples(self, iteration: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show a few of the rollout's rows in the terminal and in wandb, every `sample_table_every` iterations."""
        every = self.settings.sample_table_every
        if every is None or iteration % every:
            return
        shown = min(SAMPLES_SHOWN, len(rows))
        chosen = [rows[number * len(rows) // shown] for number in range(shown)]
        self.tracker.log_table("samples", SAMPLE_COLUMNS, [_sample(row) for row in chosen])
        cells = tuple(tuple(map(_cell, _sample(row))) for row in chosen)
        with tqdm.external_write_mode():
            print_sheet(Sheet(f"samples of iteration {iteration}", SAMPLE_COLUMNS, cells, labels=2), Console())

    def _resume(self, iteration: int) -> Ending | None:
        truncate_rows(self.output / ALARMS, "iteration", iteration)
        (self.output / ALARMS).touch()
        self.history = list(read_jsonl(self.output / METRICS))
        return self._ending(iteration)

    def _observe(self, iteration: int, figures: Mapping[str, float]) -> Observed:
        row = json_row(iteration, figures)
        self.history.append(row)
        controlled = {"score_length_controlled": length_controlled_score(self.history, self.settings.watch.window)}
        row |= controlled
        alarms = fired(WatchedRun(self.history, self.settings.watch, self.gold))
        end = self._ending(iteration)
        if end is not None and end.sentence:
            alarms.append(Alarm("early_stop" if end.stopped else "roll_back", end.sentence))
        alarm_figures = {f"alarm/{alarm.name}": 1.0 for alarm in alarms}
        row |= alarm_figures
        self._report(iteration, alarms)
        return Observed(controlled | alarm_figures, end)

    def _ending(self, iteration: int) -> Ending | None:
        saved = sorted({*checkpoint.saved_iterations(self.output), iteration})
        return ending(self.history, saved, iteration, self.settings.iterations, self.settings.early_stop)

    def _report(self, iteration: int, alarms: Sequence[Alarm]) -> None:
        with (self.output / ALARMS).open("a", encoding="utf-8") as out:
            for alarm in alarms:
                row = {"iteration": iteration, "alarm": alarm.name, "sentence": alarm.sentence}
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
                tqdm.write(printable(f"ppo, iteration {iteration}: {alarm.sentence} [{alarm.name}]"), file=sys.stderr)


def _sample(row: Mapping[str, Any]) -> tuple[str, str, float, float, int]:
    prompt = row["prompt"][-1]["content"]
    return prompt, row["completion"], row["score"], row["kl_to_reference_k1"], row["tokens"]


def _cell(value: Any) -> str:
    """A number to three digits, or a text shortened to one line."""
    if not isinstance(value, str):
        return f"{value:.3g}"
    return shortened(value, SHOWN_CHARACTERS)
