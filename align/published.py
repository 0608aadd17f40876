"""A run as it was published: which stages are done, their manifests, and their rows."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from align.artefacts import MANIFEST, Manifest, file_digest, read_manifest, stage_folder
from align.errors import InputError
from align.stages import all_stages


@dataclass(frozen=True)
class PublishedRun:
    """The folder of a run, and the manifest of each stage that is done."""

    folder: Path
    manifests: Mapping[str, Manifest]

    @property
    def name(self) -> str:
        """The recipe's name and the constitution's, as the folders have them."""
        resolved = self.folder.resolve()
        return f"{resolved.parent.name}/{resolved.name}"

    def stage(self, stage: str) -> Path:
        """A stage's folder, which is there if its manifest is."""
        return stage_folder(self.folder, stage)

    def rows(self, stage: str, file: str) -> Path:
        """A file that a stage published, as the stage left it.

        Raises:
            InputError: the stage is not done, or the file is gone or not what the stage wrote.
        """
        if stage not in self.manifests:
            raise InputError(
                f"{self.folder}: `{stage}` is not done in this run; finish it with `align run RECIPE`, whose "
                "`align plan` says what is missing"
            )
        path = self.stage(stage) / file
        written = self.manifests[stage].outputs.get(file)
        if written is None or not path.is_file():
            raise InputError(f"{path}: no such file, which `{stage}` writes; remove {path.parent} and run it again")
        if file_digest(path) != written:
            raise InputError(
                f"{path}: has changed since `{stage}` wrote it, so that its manifest no longer tells how it was made; "
                f"remove {path.parent} and run it again"
            )
        return path


def read_published(folder: Path) -> PublishedRun:
    """The run in a folder.

    Raises:
        InputError: there is no such folder, or it holds no run.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder (looked in {Path.cwd()}); name a run, such as runs/RECIPE/RUN")
    found = {stage: manifest for stage in all_stages() if (manifest := read_manifest(stage_folder(folder, stage)))}
    own = [stage for stage in found if (folder / stage / MANIFEST).is_file()]
    if not own:
        raise InputError(f"{folder}: not a run, for no stage is done in it{_hint(folder)}")
    return PublishedRun(folder, found)


def _hint(folder: Path) -> str:
    """Where a run may be instead, in words."""
    if (folder / MANIFEST).is_file():
        return f"; it is the folder of one stage: name {folder.parent}"
    runs = sorted({path.parent.parent.name for path in folder.glob(f"*/*/{MANIFEST}")} - {"shared"})
    return f"; there are {', '.join(runs)} below it" if runs else "; name a folder such as runs/RECIPE/RUN"
