"""A run as it was published: which stages are done, their manifests, and their rows."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from align.engines.provenance import PROVENANCE, Provenance, read_provenance
from align.errors import InputError
from align.run.artefacts import MANIFEST, RELABELLED, Manifest, read_manifest, require_unchanged, stage_folder
from align.stages import all_stages


@dataclass(frozen=True)
class PublishedRun:
    """The folder of a run, and the manifest of each stage that is done; or that of labels made again, of `compare`
    alone, which has no folders in it."""

    folder: Path
    manifests: Mapping[str, Manifest]
    relabelled: bool = False

    @property
    def name(self) -> str:
        """The recipe's name and the constitution's, as the folders have them; of labels made again that of theirs."""
        resolved = self.folder.resolve()
        return resolved.name if self.relabelled else f"{resolved.parent.name}/{resolved.name}"

    def stage(self, stage: str) -> Path:
        """A stage's folder, which is there if its manifest is."""
        return self.folder if self.relabelled else stage_folder(self.folder, stage)

    def made_into(self, *stages: str) -> "PublishedRun":
        """The run without the stages that none of these was made from.

        Ids say which prompt a row is about and not what it says, so that rows of stages that do not belong together
        would be joined all the same.

        Raises:
            InputError: an earlier stage was made again since.
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
                    "made again since; bring the run up to date with `align run RECIPE`, whose `align plan` says why"
                )

    def rows(self, stage: str, file: str) -> Path:
        """A file that a stage published, as the stage left it.

        Raises:
            InputError: the stage is not done, or the file is gone or not what the stage wrote.
        """
        if stage not in self.manifests and self.relabelled:
            raise InputError(f"{self.folder}: labels made again, with no rows of `{stage}`; export the run they are of")
        if stage not in self.manifests:
            raise InputError(
                f"{self.folder}: `{stage}` is not done in this run; finish it with `align run RECIPE`, whose "
                "`align plan` says what is missing"
            )
        path = self.stage(stage) / file
        require_unchanged(path, self.manifests[stage])
        return path

    def provenance(self, stage: str) -> dict[str, Provenance]:
        """The entries that a stage's rows name, as the stage left them; none of a stage of an earlier version.

        Raises:
            InputError: as for `rows`.
        """
        if stage not in self.manifests or PROVENANCE not in self.manifests[stage].outputs:
            return {}
        return read_provenance(self.rows(stage, PROVENANCE).parent)


def read_published(folder: Path) -> PublishedRun:
    """The run in a folder, or the labels of one that `align relabel` made again.

    Raises:
        InputError: there is no such folder, or it holds no run.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder (looked in {Path.cwd()}); name a run, such as runs/RECIPE/RUN")
    if (alone := read_manifest(folder)) and RELABELLED in alone.inputs:
        return PublishedRun(folder, {alone.stage: alone}, relabelled=True)
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
