"""Watching a PPO run: alarms, samples to look at, and the end before its time. The loop asks once an iteration.

Only the first process looks, at its own figures, and what it decides holds in all. Whatever it decides follows from
the rows of `metrics.jsonl` and the checkpoints on disk, so a resumed run decides as an undisturbed one.
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
from align.rl.alarms import Alarm, Seen, fired
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
    """What looking at an iteration adds to its figures, and the run's end where this was its last."""

    figures: dict[str, float]
    ending: Ending | None


class Watch:
    """Looks at a run's figures as they come.

    Args:
        gold: names of the reward sources that nothing is trained against.
        output: the stage's folder, with `metrics.jsonl` and the checkpoints; alarms go to `alarms.jsonl` there.
    """

    def __init__(self, settings: PpoBlock, gold: Sequence[str], output: Path, tracker: Tracker) -> None:
        self.settings = settings
        self.gold = tuple(gold)
        self.output = output
        self.tracker = tracker
        self.history: list[Row] = []

    def resume(self, iteration: int) -> Ending | None:
        """Go on after `iteration` iterations; the run's end where it had ended there. Call in every process."""
        return processes.decide_on_first_rank(lambda: self._resume(iteration))

    def observe(self, iteration: int, figures: Mapping[str, float]) -> Observed:
        """Look at a finished iteration. Call in every process, before its figures are logged."""
        return processes.decide_on_first_rank(lambda: self._observe(iteration, figures))

    def worth_keeping(self, saved: Sequence[int]) -> Collection[int]:
        """Which earlier checkpoint to keep beside the newest: the best of them, where the run may roll back to it."""
        block = self.settings.early_stop
        return {best_checkpoint(self.history, saved, block)} if saved and block and block.roll_back else ()

    def show_samples(self, iteration: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Every `sample_table_every` iterations, a few of the rollout's rows, in the terminal and in wandb."""
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
        found = {"score_length_controlled": length_controlled_score(self.history, self.settings.watch.window)}
        row |= found
        alarms = fired(Seen(self.history, self.settings.watch, self.gold))
        end = self._ending(iteration)
        if end is not None and end.sentence:
            alarms.append(Alarm("early_stop" if end.stopped else "roll_back", end.sentence))
        told = {f"alarm/{alarm.name}": 1.0 for alarm in alarms}
        row |= told
        self._tell(iteration, alarms)
        return Observed(found | told, end)

    def _ending(self, iteration: int) -> Ending | None:
        saved = sorted({*checkpoint.saved_iterations(self.output), iteration})
        return ending(self.history, saved, iteration, self.settings.iterations, self.settings.early_stop)

    def _tell(self, iteration: int, alarms: Sequence[Alarm]) -> None:
        with (self.output / ALARMS).open("a", encoding="utf-8") as out:
            for alarm in alarms:
                row = {"iteration": iteration, "alarm": alarm.name, "sentence": alarm.sentence}
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
                tqdm.write(printable(f"ppo, iteration {iteration}: {alarm.sentence} [{alarm.name}]"), file=sys.stderr)


def _sample(row: Mapping[str, Any]) -> tuple[str, str, float, float, int]:
    prompt = row["prompt"][-1]["content"]
    return prompt, row["completion"], row["score"], row["kl_to_reference_k1"], row["tokens"]


def _cell(value: Any) -> str:
    """A figure in three digits; a text in one line, cut where it is long."""
    if not isinstance(value, str):
        return f"{value:.3g}"
    return shortened(value, SHOWN_CHARACTERS)
