"""Run directories, journals and manifests: how a stage's results reach the disk whole or not at all.

A stage works in `<run>/.partial/<stage>-<fingerprint>/`, which survives a kill, and is published by one rename to
`<run>/<stage>/` once its `manifest.json` has been written there last. A folder with a manifest is complete.
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

MANIFEST = "manifest.json"
PARTIAL = ".partial"
SHARED_RUN = "shared"
"""The folder, beside the runs of a recipe, of stages that do not depend on the constitution."""
RELABELLED = "relabelled"
"""The input that labels made again name in their manifest: the labels that they were made from."""
NOT_RELABELLED = "revision_pairs_not_relabelled"
"""Counts, of labels made again, the pairs of revisions whose scores were not kept: they have the label of then."""
SECONDS_BETWEEN_SYNCS = 1.0
"""A journal waits for the disk no more often than this: it takes milliseconds, which quick engines have not."""


@dataclass(frozen=True)
class Manifest:
    """What a stage read, did and wrote.

    `fingerprint` is the digest of the recipe slice and the inputs; `outputs` maps each file to its SHA-256;
    `counts` and `figures` are the stage's own numbers; `processes` how many ranks made it; `environment` the versions.
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
        """Identity of the outputs alone: equal for two runs that made the same bytes."""
        return digest(self.outputs)


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest of a published stage, or None where the stage has not been published."""
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
            f"{path}: not a manifest of this version ({error}); remove {directory} to make it again"
        ) from None


def write_json(path: Path, value: Any) -> None:
    """`write_text` of a value as JSON."""
    write_text(path, json_text(value))


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one, never half of one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_asked(path: Path, text: str, option: str) -> None:
    """`write_text` of a file that the command line named with an option.

    Raises:
        InputError: it cannot be written.
    """
    try:
        write_text(path, text)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another place with {option}") from None


def json_text(value: Any) -> str:
    """A value as JSON, the same text for the same value."""
    return json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n"


def write_json_if_changed(path: Path, value: Any) -> bool:
    """`write_json`, leaving the file and its time alone where it says the same already; returns whether it wrote."""
    text = json_text(value)
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return True


def stage_folder(run: Path, stage: str) -> Path:
    """Where a run's stage is published: in its own folder, or in what the runs of a recipe share."""
    places = (run / stage, run.parent / SHARED_RUN / stage)
    return next((place for place in places if place.is_dir()), places[0])


def require_run(run: Path, *stages: str) -> None:
    """Refuse what is no run's folder, before it is taken for a run that is not finished.

    Args:
        stages: those whose own folder may be named too.

    Raises:
        InputError: there is no such folder, or it is that of another stage.
    """
    if not run.is_dir():
        raise InputError(f"{run}: no such folder (looked in {Path.cwd()}); name the folder of a run")
    manifest = read_manifest(run)
    if manifest is not None and manifest.stage not in stages:
        if RELABELLED in manifest.inputs:
            raise InputError(f"{run}: labels made again; name the run that they are of")
        raise InputError(f"{run}: the folder of a stage; name its run's, {run.parent}")


def require_as_written(path: Path, manifest: Manifest) -> None:
    """Refuse a file that is not what its stage wrote, of which the manifest tells.

    Raises:
        InputError: it is gone, or has changed.
    """
    written = manifest.outputs.get(path.name)
    if written is None or not path.is_file():
        raise InputError(
            f"{path}: no such file, which `{manifest.stage}` writes; remove {path.parent} and run it again"
        )
    if file_digest(path) != written:
        raise InputError(
            f"{path}: has changed since `{manifest.stage}` wrote it, so that its manifest no longer tells how it was "
            f"made; remove {path.parent} and run it again"
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
    """SHA-256 of each output, folders expanded to their files; keys are paths relative to `directory`."""
    digests: dict[str, str] = {}
    for name in outputs:
        path = directory / name
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        digests.update({str(file.relative_to(directory)): file_digest(file) for file in files})
    return digests


def partial_directory(run: Path, stage: str, fingerprint: str) -> Path:
    """Where a stage works until it is published; made if missing, and those of other fingerprints removed."""
    directory = run / PARTIAL / f"{stage}-{fingerprint}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{run}: cannot be written ({error.strerror}); choose another place with `output:` in the recipe "
            "or --set output=DIR"
        ) from None
    for stale in directory.parent.glob(f"{stage}-*"):
        if stale != directory:
            shutil.rmtree(stale, ignore_errors=True)
    return directory


def publish(partial: Path, final: Path, manifest: Manifest) -> None:
    """Write the manifest into the partial folder and move the folder into place, replacing an earlier result."""
    write_json(partial / MANIFEST, manifest.__dict__)
    retired = final.with_name(f".{final.name}.old")
    shutil.rmtree(retired, ignore_errors=True)
    if final.exists():
        os.replace(final, retired)
    os.replace(partial, final)
    shutil.rmtree(retired, ignore_errors=True)


class Journal:
    """An append-only JSONL file of finished rows, keyed by `id`, that a kill cannot corrupt.

    Opening it reads what is there, drops a last line that a kill cut short, and keeps the first row of each id. Each
    process appends to a file of its own (`path.rank`), and reads everybody's: so a run goes on with any number of
    processes. All its rows are held in memory: long work takes a journal for each window (`align.run.streaming`).
    """

    def __init__(self, path: Path, rank: int = 0, check: Callable[[Mapping[str, Any]], object] = len) -> None:
        """Open the journal.

        Args:
            check: raises ValueError, TypeError or KeyError for a row that cannot be used.

        Raises:
            InputError: a line, other than a last one that a kill cut short, is damaged or fails the check.
        """
        self.rows: dict[str, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        own = path.with_name(f"{path.name}.{rank}")
        _drop_torn_line(own)
        for part in sorted(path.parent.glob(f"{path.name}.*")):
            for number, line in enumerate(part.read_bytes().split(b"\n")[:-1], start=1):
                row = _journal_row(part, number, line, check)
                self.rows.setdefault(row["id"], row)
        self._file = own.open("a", encoding="utf-8")
        self._synced = time.monotonic()

    def __contains__(self, row_id: str) -> bool:
        return row_id in self.rows

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a finished row; a row whose id is there already is left alone.

        A kill cannot take it any more; a machine that loses its power loses what it did in the last second.
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
            raise TypeError("its `id` is no text")
        check(row)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        why = f"no `{error.args[0]}`" if isinstance(error, KeyError) else error
        raise InputError(
            f"{path}, line {number}: damaged ({why}); remove the line, or the file with all its finished rows, and "
            "run again"
        ) from None
    return row


def _drop_torn_line(path: Path) -> None:
    """Cut a file back to its last newline."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as handle:
            handle.truncate(whole)
