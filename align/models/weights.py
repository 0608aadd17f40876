"""What identifies a model's weights: the folder they lie in, and their digest."""

import hashlib
import os
from pathlib import Path

from align.artefacts import file_digest
from align.models.sources import resolve_model

SNAPSHOTS = "snapshots"
"""The folder of the hub's cache below which each revision has its own."""


def model_folder(path: str, revision: str | None = None) -> Path | None:
    """The folder that a model is loaded from; None for one that is neither here nor in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    resolved = resolve_model(path, revision=revision)
    if os.path.isdir(resolved):
        return Path(resolved)
    config = try_to_load_from_cache(resolved, "config.json", revision=revision)
    return Path(config).parent if isinstance(config, str) else None


def weights_digest(folder: Path) -> str:
    """SHA-256 of a model's weights: of the one file, or, of several, of what `sha256sum *.safetensors` prints.

    Of one file it is what the hub shows, and the manifest of the stage that made it. Empty where there is no such file.
    """
    files = sorted(folder.glob("*.safetensors"))
    digests = [file_digest(file) for file in files]
    if len(files) < 2:
        return "".join(digests)
    listing = "".join(f"{found}  {file.name}\n" for found, file in zip(digests, files, strict=True))
    return hashlib.sha256(listing.encode()).hexdigest()


def hub_revision(folder: Path) -> str:
    """The commit of a folder in the hub's cache; empty for any other."""
    return folder.name if folder.parent.name == SNAPSHOTS else ""
