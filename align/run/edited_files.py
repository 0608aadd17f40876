"""Finds outputs that were changed after their stage had published them."""

from pathlib import Path

from align.run.artefacts import MANIFEST, Manifest, file_digest


def edited_outputs(directory: Path, manifest: Manifest) -> list[str]:
    """The outputs whose content is no longer what the manifest recorded, relative to `directory`.

    A file is only read if it changed, by its times, after the manifest was written or last found up to date. The ctime
    is checked too, because a file that replaces another may keep an older mtime.

    Raises:
        InputError: this user may not read a file.
    """
    written = (directory / MANIFEST).stat().st_mtime_ns
    later = [name for name in manifest.outputs if _changed_at(directory / name) > written]
    return [name for name in later if file_digest(directory / name) != manifest.outputs[name]]


def _changed_at(file: Path) -> int:
    status = file.stat()
    return max(status.st_mtime_ns, status.st_ctime_ns)
