"""Identifying a model's weights: the folder they are loaded from, and their digest."""

import hashlib
import json
import os
from pathlib import Path

from align.models.sources import resolve_model
from align.run.artefacts import MANIFEST, file_digest, read_manifest

SNAPSHOTS = "snapshots"
"""The folder in the hub's cache that contains a folder for each revision."""


def model_folder(path: str, revision: str | None = None) -> Path | None:
    """The folder that a model is loaded from, or None where the model is neither local nor in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    resolved = resolve_model(path, revision=revision)
    if os.path.isdir(resolved):
        return Path(resolved)
    config = try_to_load_from_cache(resolved, "config.json", revision=revision)
    return Path(config).parent if isinstance(config, str) else None


class Weights:
    """The weights in a model's folder. A digest reads each file whole, but only once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.digests: dict[str, str] = {}
        """SHA-256 of each file by its name, size and modification time."""

    def digest(self) -> str:
        """SHA-256 of the single weights file or, for several, of the lines that `sha256sum` prints for them in order.

        For one file, the hub and the manifest of the stage that wrote it show the same digest. Empty without any files.
        """
        files = loaded_files(self.folder)
        digests = [self._digest(file) for file in files]
        if len(files) < 2:
            return "".join(digests)
        listing = "".join(f"{found}  {file.name}\n" for found, file in zip(digests, files, strict=True))
        return hashlib.sha256(listing.encode()).hexdigest()

    def _digest(self, file: Path) -> str:
        status = file.stat()
        stamp = f"{file.name} {status.st_size} {status.st_mtime_ns}"
        if stamp not in self.digests:
            self.digests[stamp] = _published_digest(file) or file_digest(file)
        return self.digests[stamp]


def loaded_files(folder: Path) -> list[Path]:
    """The files that `from_pretrained` loads: the single file or, without one, those in the index, sorted by name."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file() or not index.is_file():
        return [whole] if whole.is_file() else []
    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / name for name in sorted(set(names))]


def _published_digest(file: Path) -> str:
    """A file's digest in the manifest of the stage that wrote the model; empty where the file has changed since.

    The ctime is checked too, because a file that replaces another may keep an older mtime.
    """
    path, status = file.parent.parent / MANIFEST, file.stat()
    if not path.is_file() or path.stat().st_mtime_ns < max(status.st_mtime_ns, status.st_ctime_ns):
        return ""
    manifest = read_manifest(path.parent)
    return manifest.outputs.get(f"{file.parent.name}/{file.name}", "") if manifest else ""


def hub_revision(folder: Path) -> str:
    """The commit of a folder in the hub's cache; empty for any other folder."""
    return folder.name if folder.parent.name == SNAPSHOTS else ""
