"""Reuses a result that another run has made from the same settings and inputs, as the runs of a sweep do.

The files are hard links, or copies where the file system has none. Both runs remain complete if the other is removed.
"""

import os
import shutil
from contextlib import suppress
from pathlib import Path

from align.errors import InputError
from align.run.artefacts import MANIFEST, Manifest, partial_directory, publish, read_manifest
from align.run.edited_files import edited_outputs


def equal_result(output: Path, stage: str, fingerprint: str | None) -> Path | None:
    """The folder below `output` of a whole, unedited result of the stage with this fingerprint; None without one."""
    if fingerprint is None:
        return None
    folders = (path.parent for path in sorted(output.glob(f"*/*/{stage}/{MANIFEST}")))
    return next((folder for folder in folders if _has(folder, fingerprint)), None)


def reuse(source: Path, target: Path) -> None:
    """Publish the result in `source` as `target`, a stage's folder in another run."""
    manifest = read_manifest(source)
    assert manifest is not None
    partial = partial_directory(target.parent, target.name, "reused")
    for name in manifest.outputs:
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        _link(source / name, partial / name)
    publish(partial, target, manifest)
    # A new link changes the files' ctime. The source's manifest says again that they are as it describes them.
    with suppress(OSError):
        os.utime(source / MANIFEST)


def _has(folder: Path, fingerprint: str) -> bool:
    manifest = _readable_manifest(folder)
    if manifest is None or manifest.fingerprint != fingerprint:
        return False
    return all((folder / name).is_file() for name in manifest.outputs) and not edited_outputs(folder, manifest)


def _readable_manifest(folder: Path) -> Manifest | None:
    """The manifest; None where it cannot be used, because the faults of another run are not this one's."""
    try:
        return read_manifest(folder)
    except InputError:
        return None


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
