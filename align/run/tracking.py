"""Where a stage's figures go: `metrics.jsonl` always, Weights & Biases when asked. Only the first process writes."""

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
from align.settings.blocks import TrackingBlock

METRICS = "metrics.jsonl"
TIMINGS = "timings.jsonl"
WANDB_FOLDER = ".wandb"
RUN_ID_FILE = "wandb-run-id"
MODES_WITH_LOGIN = ("online", "shared", "run")
_WANDB_HOST = "https://api.wandb.ai"


class Tracker:
    """Rows of figures, each with its step, appended to `directory/metrics.jsonl`.

    With `block.wandb` they go to wandb as well: one run a stage, grouped by `run_name`, its files in
    `directory/../.wandb` so that they survive the stage's publication. wandb never ends a stage: where it fails, a
    warning says so once and the figures go on into the file.
    """

    def __init__(self, directory: Path, block: TrackingBlock, run_name: str, stage: str) -> None:
        self.path = directory / METRICS
        self._file: IO[str] | None = None
        self._wandb: Any = None
        if not processes.is_first():
            return
        directory.mkdir(parents=True, exist_ok=True)
        _end_with_newline(self.path)
        self._file = self.path.open("a", encoding="utf-8")
        if block.wandb:
            self._guard(lambda: self._start_wandb(directory, block, run_name, stage))

    def log(self, step: int, figures: Mapping[str, float], timings: Mapping[str, float] | None = None) -> None:
        """Add a row, on disk before this returns. A figure that is not finite is written as null.

        `timings` go to a file of their own, which is no part of a stage's identity: two equal runs never take equally
        long.
        """
        if self._file is None:
            return
        if timings:
            with (self.path.parent / TIMINGS).open("a", encoding="utf-8") as out:
                out.write(json.dumps(plain_row(step, timings)) + "\n")
        row = plain_row(step, figures)
        self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()
        if self._wandb is not None:
            run = self._wandb
            self._guard(lambda: run.log({**figures, **(timings or {})}, step=step))

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Show rows (completions, say) as a wandb table; without wandb nothing is lost, as stages publish them too."""
        if self._wandb is not None:
            run = self._wandb
            self._guard(lambda: run.log({name: _table(columns, rows)}, commit=False))

    def truncate(self, step: int) -> None:
        """Drop the rows after `step`: a resumed stage logs them again. wandb keeps the first it got of a step."""
        if self._file is None:
            return
        self._file.close()
        truncate_rows(self.path, "step", step)
        self._file = self.path.open("a", encoding="utf-8")

    def close(self, failed: bool = False) -> None:
        """Close the file and finish the wandb run. What is logged afterwards goes nowhere; closing again is free."""
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
        """Call wandb; where that fails, warn and leave wandb out of what follows."""
        try:
            call()
        except Exception as error:
            self._wandb = None
            warnings.warn(f"wandb: {error!r}; figures go to {self.path} alone from here on", stacklevel=3)


def truncate_rows(path: Path, key: str, last: int) -> None:
    """Drop a JSONL file's rows whose `key` is above `last`, and a last row that a kill left unfinished.

    Raises:
        InputError: a row is damaged.
    """
    if not path.exists():
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    # As bytes: text would also be split at the line separators that a completion may hold.
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


def flat(figures: Mapping[str, Any], above: str = "") -> dict[str, float]:
    """The numbers among nested figures, each under its path: `{"accuracy": {"mean": 1}}` is `accuracy/mean`."""
    found: dict[str, float] = {}
    for name, value in figures.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{above}{name}/")
        elif isinstance(value, int | float):
            found[f"{above}{name}"] = value
    return found


def wandb_mode() -> Any:
    """`WANDB_MODE` where it is set; else online with a login and a network, and offline without.

    Nobody is ever asked for a login: without one, a mode that needs it becomes offline, with a warning.
    """
    chosen = os.environ.get("WANDB_MODE")
    host = os.environ.get("WANDB_BASE_URL", _WANDB_HOST)
    if not chosen:
        return "online" if _has_login(host) and _answers(host) else "offline"
    if chosen in MODES_WITH_LOGIN and not _has_login(host):
        warnings.warn(
            f"wandb: WANDB_MODE is {chosen} and there is no login for {host}, so the run is kept offline; "
            "log in with `wandb login` or WANDB_API_KEY, and send it later with `wandb sync`",
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


def _answers(host: str) -> bool:
    try:
        urllib.request.urlopen(host, timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    return True


def _run_id(path: Path) -> str:
    """The wandb run of this working folder, the same after a kill."""
    if not path.exists():
        _replace_text(path, secrets.token_hex(8))
    return path.read_text(encoding="utf-8")


def _replace_text(path: Path, text: str) -> None:
    """Write a file so that a kill leaves the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Any:
    import wandb

    return wandb.Table(columns=list(columns), data=[list(row) for row in rows])


def plain_row(step: int, figures: Mapping[str, float]) -> dict[str, float | None]:
    """A row as it is written, and as it is read again."""
    return {"step": step} | {name: _plain(value) for name, value in figures.items()}


def _plain(value: float) -> float | int | None:
    """A JSON number: numpy's and torch's scalars included, bool and int as they are, null where not finite."""
    if isinstance(value, int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def _end_with_newline(path: Path) -> None:
    """Cut a last row that a kill left unfinished."""
    if not path.exists():
        return
    content = path.read_bytes()
    with path.open("r+b") as handle:
        handle.truncate(content.rfind(b"\n") + 1)
