"""Reads what `align relabel` starts from: a finished `compare` folder, and the settings and principles asked for."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from align.constitution.constitution import Constitution
from align.constitution.loading import load_constitution
from align.engines.provenance import CONSTITUTION, PROVENANCE, read_constitution
from align.errors import FileProblems, InputError, Problem
from align.feedback.judged_revisions import REVISION_FILES, RevisionLabelSettings, read_settings
from align.feedback.records import Comparison
from align.pipeline.recipe_files import apply_override
from align.records import read_rows
from align.run.artefacts import Manifest, read_manifest, require_run, require_unchanged, stage_folder
from align.settings.blocks import Block, JudgeBlock
from align.settings.validation import nearest, problems_from
from align.settings.yaml_files import Lines
from align.stages.compare import STAGE, CompareBlock

RELABEL_KEYS = (
    "judge.clamp",
    "judge.min_margin",
    "judge.scale",
    "judge.min_option_mass",
    "judge.chain_of_thought_range",
    "compare.principle",
    "revise.principle",
)
"""The keys that may change: they only decide how scores become labels, so that no model has to be asked again."""
LABEL_FILES = ("comparisons.jsonl", "pairs.jsonl", "opinions.jsonl", CONSTITUTION, "agreement.json")


class LabelSettings(Block):
    """The settings that labels depend on, besides the scores."""

    seed: int
    judge: JudgeBlock
    compare: CompareBlock
    revise: RevisionLabelSettings | None = None


@dataclass(frozen=True)
class CompareFolder:
    """A finished `compare` folder. Its rows are left on disk.

    `revise` holds the settings that its revisions were labelled with; None if it does not keep their scores.
    """

    folder: Path
    manifest: Manifest
    constitution: Constitution
    revise: RevisionLabelSettings | None

    def comparisons(self) -> Iterator[Comparison]:
        """Read the rows one by one."""
        return read_rows(self.folder / "comparisons.jsonl", Comparison)

    def first_value(self, key: str) -> str:
        """The first value that is not empty under `key` of a comparison; empty if there is none."""
        return next((value for row in self.comparisons() if (value := getattr(row, key))), "")

    def settings_with(self, overrides: Sequence[str]) -> LabelSettings:
        """The settings that `compare` ran with, changed by the overrides.

        Raises:
            InputError: a key is not one of `RELABEL_KEYS`, or a value is invalid.
        """
        stored = self.manifest.settings
        content: dict[str, Any] = {"seed": stored["seed"], "judge": stored["judge"], "compare": stored["settings"]}
        if self.revise:
            content["revise"] = self.revise.model_dump(mode="json")
        for override in overrides:
            key = override.partition("=")[0].strip()
            if key.startswith("revise.") and not self.revise:
                raise InputError(f"--set {override}: {self.folder} keeps no scores of revisions; leave it out")
            if key not in RELABEL_KEYS:
                match = nearest(key, RELABEL_KEYS, 0.8)
                remedy = f"did you mean `{match}`?" if match else "run `compare` again"
                raise InputError(f"--set {override}: relabelling can only change {', '.join(RELABEL_KEYS)}; {remedy}")
            try:
                apply_override(content, override)
            except ValueError as error:
                raise FileProblems("align relabel", [Problem(f"--set {override}", str(error))]) from None
        try:
            return LabelSettings.model_validate(content)
        except ValidationError as error:
            raise FileProblems("align relabel", problems_from(error, Lines(""), LabelSettings)) from None

    def constitution_with(self, path: str | None, ids: Sequence[str]) -> Constitution:
        """The constitution to label by: that of `compare` or the one at `path`, with all principles or those named.

        Raises:
            InputError: it has no such principle.
        """
        constitution = load_constitution(path) if path else self.constitution
        known = [principle.id for principle in constitution.principles]
        if unknown := [name for name in ids if name not in known]:
            match = nearest(unknown[0], known)
            remedy = f"did you mean `{match}`?" if match else f"it has {', '.join(known)}"
            raise InputError(f"--principles {unknown[0]}: no such principle in '{constitution.id}'; {remedy}")
        if not ids:
            return constitution
        kept = tuple(principle for principle in constitution.principles if principle.id in ids)
        return constitution.model_copy(update={"principles": kept})


def read_compare_folder(source: Path) -> CompareFolder:
    """Read the `compare` folder of a run, given the run's folder or that folder itself.

    Raises:
        InputError: `compare` is not done, an old version made it without scores, or its files have changed since.
    """
    require_run(source, STAGE.name)
    folder = source if (source / "comparisons.jsonl").is_file() else stage_folder(source, STAGE.name)
    manifest = read_manifest(folder)
    if manifest is None or manifest.stage != STAGE.name:
        raise InputError(f"{source}: no finished `compare` in it; name a run's folder, or its `compare` folder")
    if missing := [name for name in LABEL_FILES if not (folder / name).is_file()]:
        raise InputError(f"{folder}: has no {missing[0]}, which this version of `compare` writes; run `compare` again")
    for name in (*LABEL_FILES, *(name for name in (*REVISION_FILES, PROVENANCE) if name in manifest.outputs)):
        require_unchanged(folder / name, manifest)
    return CompareFolder(folder, manifest, read_constitution(folder / CONSTITUTION), read_settings(folder))
