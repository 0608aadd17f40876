"""Run directories, journals and manifests: a stage's results reach the disk whole or not at all.

A stage works in `<run>/.partial/<stage>-<fingerprint>/`, which survives a kill. Its `manifest.json` is written last,
and then one rename publishes the folder as `<run>/<stage>/`. A published folder with a manifest is therefore complete.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.errors import InputError
from align.records import digest
from align.run.disk_faults import FULL_DISK

MANIFEST = "manifest.json"
PARTIAL = ".partial"
SHARED_RUN = "shared"
"""The folder for stages that do not depend on the constitution; it lies beside the recipe's runs."""
RELABELLED = "relabelled"
"""Relabelled pairs name the labels that they were made from under this key of their manifest's inputs."""
NOT_RELABELLED = "revision_pairs_not_relabelled"
"""Manifest count of the revision pairs that relabelling left with their earlier label, for want of stored scores."""
SECONDS_BETWEEN_SYNCS = 1.0
"""The least time between two fsyncs of a journal. Each takes milliseconds, which would slow down a fast engine."""


@dataclass(frozen=True)
class Manifest:
    """What a stage read, did and wrote.

    `fingerprint` is the digest of the recipe slice and the inputs; `outputs` maps each file to its SHA-256; `counts`
    and `figures` are the stage's own numbers; `processes` is the number of ranks; `environment` holds the versions.
    """

    stage: str
    fingerprint: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    outputs: dict[str, str]
    counts: dict[str, int] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    processes: int = 1
    seconds: float = 0.0
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def content_digest(self) -> str:
        """Digest of the outputs alone: equal for two runs that wrote the same bytes."""
        return digest(self.outputs)


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest of a published stage, or None if the stage has not been published."""
    path = directory / MANIFEST
    try:
        manifest = Manifest(**json.loads(path.read_text(encoding="utf-8")))
        if not all(isinstance(part, dict) for part in (manifest.settings, manifest.inputs, manifest.outputs)):
            raise TypeError("settings, inputs and outputs must be objects")
        return manifest
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); make it readable for this user") from None
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{path}: not a manifest of this version ({error}); remove {directory} and run the stage again"
        ) from None


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON with `write_text`."""
    write_text(path, json_text(value))


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: a reader, or a kill, finds the old content or the new, never part of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_option_file(path: Path, text: str, option: str) -> None:
    """Write the file that a command-line option named, with `write_text`.

    Raises:
        InputError: it cannot be written.
    """
    try:
        write_text(path, text)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another place with {option}") from None


def json_text(value: Any) -> str:
    """A value as JSON; equal values give equal texts."""
    return json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n"


def write_json_if_changed(path: Path, value: Any) -> bool:
    """`write_json`, unless the file already has this content, which keeps its modification time. Returns whether it
    wrote."""
    text = json_text(value)
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return True


def stage_folder(run: Path, stage: str) -> Path:
    """Where a run's stage is published: in the run's own folder, or in the folder that the recipe's runs share."""
    places = (run / stage, run.parent / SHARED_RUN / stage)
    return next((place for place in places if place.is_dir()), places[0])


def require_run(run: Path, *stages: str) -> None:
    """Check that a folder is a run's, which may be unfinished, and not the folder of one stage.

    Args:
        stages: the stages whose own folder is accepted too.

    Raises:
        InputError: there is no such folder, or it belongs to another stage.
    """
    if not run.is_dir():
        raise InputError(f"{run}: no such folder (looked in {Path.cwd()}); give the folder of a run")
    manifest = read_manifest(run)
    if manifest is not None and manifest.stage not in stages:
        if RELABELLED in manifest.inputs:
            raise InputError(f"{run}: a folder of relabelled pairs; give the folder of the run that they belong to")
        raise InputError(f"{run}: the folder of one stage; give the folder of its run, {run.parent}")


def require_unchanged(path: Path, manifest: Manifest) -> None:
    """Check that a file still has the digest that its stage's manifest recorded.

    Raises:
        InputError: the file is gone, or has changed.
    """
    written = manifest.outputs.get(path.name)
    if written is None or not path.is_file():
        raise InputError(
            f"{path}: no such file, although `{manifest.stage}` writes it; remove {path.parent} and run the stage again"
        )
    if file_digest(path) != written:
        raise InputError(
            f"{path}: has changed since `{manifest.stage}` wrote it, so its manifest no longer says how it was made; "
            f"remove {path.parent} and run the stage again"
        )


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes.

    Raises:
        InputError: this user may not read it.
    """
    try:
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except PermissionError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); make it readable for this user") from None


def output_digests(directory: Path, outputs: Iterable[str]) -> dict[str, str]:
    """SHA-256 of each output file, and of each file in an output folder; keys are paths relative to `directory`."""
    digests: dict[str, str] = {}
    for name in outputs:
        path = directory / name
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        digests.update({str(file.relative_to(directory)): file_digest(file) for file in files})
    return digests


def create_folder(folder: Path) -> None:
    """Create a folder below a recipe's `output`, with its parents.

    Raises:
        InputError: it cannot be created; a full disk remains an OSError, which `explained_disk_faults` handles.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in FULL_DISK:
            raise
        raise InputError(
            f"{folder}: cannot be created ({error.strerror}); choose another place with `output:` in the recipe "
            "or --set output=DIR"
        ) from None


def partial_directory(run: Path, stage: str, fingerprint: str) -> Path:
    """The folder that a stage works in until it is published. Creates it, and removes those of other fingerprints."""
    directory = run / PARTIAL / f"{stage}-{fingerprint}"
    create_folder(directory)
    for stale in directory.parent.glob(f"{stage}-*"):
        if stale != directory:
            shutil.rmtree(stale, ignore_errors=True)
    return directory


def publish(partial: Path, final: Path, manifest: Manifest) -> None:
    """Write the manifest into the partial folder, then move the folder into place, replacing an earlier result."""
    write_json(partial / MANIFEST, manifest.__dict__)
    retired = final.with_name(f".{final.name}.old")
    shutil.rmtree(retired, ignore_errors=True)
    if final.exists():
        os.replace(final, retired)
    os.replace(partial, final)
    shutil.rmtree(retired, ignore_errors=True)


class Journal:
    """An append-only JSONL file of finished rows, keyed by `id`, that a kill cannot corrupt.

    Opening it reads the existing rows, drops a last line that a kill cut short, and keeps the first row of each id.
    Each process appends to its own file (`path.rank`) and reads those of all, so a run resumes with any number of
    processes. All rows are held in memory, so long work opens one journal per window (`align.run.streaming`).
    """

    def __init__(self, path: Path, rank: int = 0, check: Callable[[Mapping[str, Any]], object] = len) -> None:
        """Open the journal.

        Args:
            check: raises ValueError, TypeError or KeyError for a row that cannot be used.

        Raises:
            InputError: a line is damaged or fails the check, other than a last line that a kill cut short.
        """
        self.rows: dict[str, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        own = path.with_name(f"{path.name}.{rank}")
        drop_torn_line(own)
        for part in sorted(path.parent.glob(f"{path.name}.*")):
            for number, line in enumerate(part.read_bytes().split(b"\n")[:-1], start=1):
                row = _journal_row(part, number, line, check)
                self.rows.setdefault(row["id"], row)
        self._file = own.open("a", encoding="utf-8")
        self._synced = time.monotonic()

    def __contains__(self, row_id: str) -> bool:
        return row_id in self.rows

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a finished row, unless its id is there already.

        The row then survives a kill. A power failure may lose the rows of the last second.
        """
        if row["id"] in self.rows:
            return
        self.rows[row["id"]] = dict(row)
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()
        if time.monotonic() - self._synced > SECONDS_BETWEEN_SYNCS:
            self._sync()

    def close(self) -> None:
        self._sync()
        self._file.close()

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _journal_row(path: Path, number: int, line: bytes, check: Callable[[Mapping[str, Any]], object]) -> dict[str, Any]:
    try:
        row: dict[str, Any] = json.loads(line)
        if not isinstance(row["id"], str):
            raise TypeError("its `id` is not text")
        check(row)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        why = f"no `{error.args[0]}`" if isinstance(error, KeyError) else error
        raise InputError(
            f"{path}, line {number}: damaged ({why}); remove the line, or the file and with it all its finished rows, "
            "and run again"
        ) from None
    return row


def drop_torn_line(path: Path) -> None:
    """Truncate a file to its last newline, which drops a last line that a kill cut short."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
