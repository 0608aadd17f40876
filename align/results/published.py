"""A run as it was published: which stages are done, their manifests and their files."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from align.engines.provenance import PROVENANCE, Provenance, read_provenance
from align.errors import InputError
from align.run.artefacts import MANIFEST, RELABELLED, Manifest, read_manifest, require_unchanged, stage_folder
from align.stages import all_stages


@dataclass(frozen=True)
class PublishedRun:
    """A run's folder and the manifest of each stage that is done.

    If `relabelled`, it is instead a folder that `align relabel` wrote: the files of `compare` alone, without a
    subfolder for the stage.
    """

    folder: Path
    manifests: Mapping[str, Manifest]
    relabelled: bool = False

    @property
    def name(self) -> str:
        """The recipe's name and the constitution's, as the folders are called; the folder's own name if relabelled."""
        resolved = self.folder.resolve()
        return resolved.name if self.relabelled else f"{resolved.parent.name}/{resolved.name}"

    def stage(self, stage: str) -> Path:
        """A stage's folder; it exists if the stage has a manifest."""
        return self.folder if self.relabelled else stage_folder(self.folder, stage)

    def with_upstream_of(self, *stages: str) -> "PublishedRun":
        """The run reduced to these stages and those that they were made from.

        Rows refer to prompts by id alone, so rows of stages that do not belong together would be joined unnoticed.

        Raises:
            InputError: an upstream stage was rerun with another result since.
        """
        kept: set[str] = set()
        waiting = list(stages)
        while waiting:
            stage = waiting.pop()
            if stage in kept or stage not in self.manifests:
                continue
            kept.add(stage)
            self._require_inputs(stage)
            waiting += self.manifests[stage].inputs
        return replace(self, manifests={name: each for name, each in self.manifests.items() if name in kept})

    def _require_inputs(self, stage: str) -> None:
        for name, read in self.manifests[stage].inputs.items():
            if name in self.manifests and self.manifests[name].content_digest != read:
                raise InputError(
                    f"{self.stage(stage)}: `{stage}` was made from another `{name}` than {self.stage(name)}, which was "
                    "rerun since; bring the run up to date with `align run RECIPE` (`align plan RECIPE` says why)"
                )

    def published_file(self, stage: str, file: str) -> Path:
        """A file that a stage published, unchanged since.

        Raises:
            InputError: the stage is not done, or the file is missing or has changed.
        """
        if stage not in self.manifests and self.relabelled:
            raise InputError(f"{self.folder}: relabelled pairs, with no rows of `{stage}`; export their run instead")
        if stage not in self.manifests:
            raise InputError(
                f"{self.folder}: `{stage}` is not done in this run; finish it with `align run RECIPE` (`align plan "
                "RECIPE` says what is missing)"
            )
        path = self.stage(stage) / file
        require_unchanged(path, self.manifests[stage])
        return path

    def provenance(self, stage: str) -> dict[str, Provenance]:
        """The provenance entries of a stage's rows by id; none if the stage is not done or an old version made it.

        Raises:
            InputError: the file is missing or has changed.
        """
        if stage not in self.manifests or PROVENANCE not in self.manifests[stage].outputs:
            return {}
        return read_provenance(self.published_file(stage, PROVENANCE).parent)


def read_published(folder: Path) -> PublishedRun:
    """The run in a folder, or the relabelled pairs that `align relabel` wrote there.

    Raises:
        InputError: there is no such folder, or it holds no run.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder (looked in {Path.cwd()}); name a run, such as runs/RECIPE/RUN")
    if (relabelled := read_manifest(folder)) and RELABELLED in relabelled.inputs:
        return PublishedRun(folder, {relabelled.stage: relabelled}, relabelled=True)
    found = {stage: manifest for stage in all_stages() if (manifest := read_manifest(stage_folder(folder, stage)))}
    if not any((folder / stage / MANIFEST).is_file() for stage in found):
        raise InputError(f"{folder}: not a run, since no stage is done in it; {_suggestion(folder)}")
    return PublishedRun(folder, found)


def _suggestion(folder: Path) -> str:
    """Which folder the user may have meant."""
    if (folder / MANIFEST).is_file():
        return f"it is the folder of one stage: name {folder.parent}"
    runs = sorted({path.parent.parent.name for path in folder.glob(f"*/*/{MANIFEST}")} - {"shared"})
    return f"it contains the runs {', '.join(runs)}: name one" if runs else "name a folder such as runs/RECIPE/RUN"
