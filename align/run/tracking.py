"""Logs a stage's figures: always to `metrics.jsonl`, on request to Weights & Biases too. Only the first rank writes."""

import json
import math
import netrc
import os
import secrets
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self
from urllib.parse import urlsplit

from align.errors import InputError
from align.run import processes
from align.run.artefacts import drop_torn_line, write_text
from align.settings.blocks import TrackingBlock

METRICS = "metrics.jsonl"
TIMINGS = "timings.jsonl"
WANDB_FOLDER = ".wandb"
RUN_ID_FILE = "wandb-run-id"
MODES_WITH_LOGIN = ("online", "shared", "run")
_WANDB_HOST = "https://api.wandb.ai"


class Tracker:
    """Appends rows of figures, each with its step, to `directory/metrics.jsonl`.

    With `block.wandb` they also go to wandb: one run per stage, grouped by `run_name`. Its files lie in
    `directory/../.wandb`, so that they survive the stage's publication. A failure of wandb never ends a stage: one
    warning reports it, and logging continues to the file alone.
    """

    def __init__(self, directory: Path, block: TrackingBlock, run_name: str, stage: str) -> None:
        self.path = directory / METRICS
        self._file: IO[str] | None = None
        self._wandb: Any = None
        if not processes.is_first():
            return
        directory.mkdir(parents=True, exist_ok=True)
        drop_torn_line(self.path)
        self._file = self.path.open("a", encoding="utf-8")
        if block.wandb:
            self._guard(lambda: self._start_wandb(directory, block, run_name, stage))

    def log(self, step: int, figures: Mapping[str, float], timings: Mapping[str, float] | None = None) -> None:
        """Add a row; it survives a kill once this returns. A figure that is not finite is written as null.

        `timings` go to a separate file, which is not part of the stage's outputs: equal runs never take equally long.
        """
        if self._file is None:
            return
        if timings:
            with (self.path.parent / TIMINGS).open("a", encoding="utf-8") as out:
                out.write(json.dumps(json_row(step, timings)) + "\n")
        row = json_row(step, figures)
        self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()
        if self._wandb is not None:
            run = self._wandb
            self._guard(lambda: run.log({**figures, **(timings or {})}, step=step))

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Show rows, such as completions, as a wandb table. Without wandb nothing is lost: stages publish them too."""
        if self._wandb is not None:
            run = self._wandb
            self._guard(lambda: run.log({name: _table(columns, rows)}, commit=False))

    def truncate(self, step: int) -> None:
        """Drop the rows after `step`, which a resumed stage logs again. wandb keeps the first row it got of a step."""
        if self._file is None:
            return
        self._file.close()
        truncate_rows(self.path, "step", step)
        self._file = self.path.open("a", encoding="utf-8")

    def close(self, failed: bool = False) -> None:
        """Close the file and finish the wandb run. Later calls of `log` and `close` do nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._wandb is not None:
            run = self._wandb
            self._guard(lambda: run.finish(exit_code=int(failed)))
            self._wandb = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def _start_wandb(self, directory: Path, block: TrackingBlock, run_name: str, stage: str) -> None:
        import wandb

        folder = directory.parent / WANDB_FOLDER
        folder.mkdir(exist_ok=True)
        self._wandb = wandb.init(
            project=block.project,
            entity=block.entity,
            group=run_name,
            name=f"{run_name}/{stage}",
            job_type=stage,
            id=_run_id(directory / RUN_ID_FILE),
            resume="allow",
            dir=folder,
            mode=wandb_mode(),
            settings=wandb.Settings(console="off", init_timeout=60, login_timeout=1),
        )

    def _guard(self, call: Callable[[], object]) -> None:
        """Call wandb; if that fails, warn and stop using wandb."""
        try:
            call()
        except Exception as error:
            self._wandb = None
            warnings.warn(f"wandb: {error!r}; from here on figures go to {self.path} alone", stacklevel=3)


def truncate_rows(path: Path, key: str, last: int) -> None:
    """Drop a JSONL file's rows whose `key` is above `last`, and a last row that a kill cut short.

    Raises:
        InputError: a row is damaged.
    """
    if not path.exists():
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    # As bytes: text mode would also split rows at the line separators that a completion may contain.
    with path.open("rb") as lines, temporary.open("wb") as kept:
        for number, line in enumerate(lines, start=1):
            if line.endswith(b"\n") and _number_of(line, key, path, number) <= last:
                kept.write(line)
    os.replace(temporary, path)


def _number_of(line: bytes, key: str, path: Path, number: int) -> int:
    try:
        return int(json.loads(line)[key])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}, line {number}: damaged ({error}); remove the line and run again") from None


def flatten_figures(figures: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers among nested figures, each under its path: `{"accuracy": {"mean": 1}}` gives `accuracy/mean`."""
    found: dict[str, float] = {}
    for name, value in figures.items():
        if isinstance(value, Mapping):
            found |= flatten_figures(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            found[f"{prefix}{name}"] = value
    return found


def wandb_mode() -> Any:
    """`WANDB_MODE` if it is set; otherwise online if there are a login and a network, and offline if not.

    wandb never prompts for a login: without one, a mode that needs it becomes offline, with a warning.
    """
    chosen = os.environ.get("WANDB_MODE")
    host = os.environ.get("WANDB_BASE_URL", _WANDB_HOST)
    if not chosen:
        return "online" if _has_login(host) and _is_reachable(host) else "offline"
    if chosen in MODES_WITH_LOGIN and not _has_login(host):
        warnings.warn(
            f"wandb: WANDB_MODE is {chosen} and there is no login for {host}, so the run is kept offline; "
            "log in with `wandb login` or WANDB_API_KEY, and upload it later with `wandb sync`",
            stacklevel=2,
        )
        return "offline"
    return chosen


def _has_login(host: str) -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    names = [os.environ.get("NETRC"), "~/.netrc", "~/_netrc"]
    for path in (Path(name).expanduser() for name in names if name):
        try:
            if netrc.netrc(path).authenticators(urlsplit(host).hostname or ""):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _is_reachable(host: str) -> bool:
    try:
        urllib.request.urlopen(host, timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    return True


def _run_id(path: Path) -> str:
    """The id of this working folder's wandb run, which a resumed stage continues."""
    if not path.exists():
        write_text(path, secrets.token_hex(8))
    return path.read_text(encoding="utf-8")


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Any:
    import wandb

    return wandb.Table(columns=list(columns), data=[list(row) for row in rows])


def json_row(step: int, figures: Mapping[str, float]) -> dict[str, float | None]:
    """A row of figures as it is written to `metrics.jsonl`, with None for figures that are not finite."""
    return {"step": step} | {name: _json_number(value) for name, value in figures.items()}


def _json_number(value: float) -> float | int | None:
    """A number, or a scalar of numpy or torch, as JSON takes it: bool and int unchanged, None if not finite."""
    if isinstance(value, int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None
