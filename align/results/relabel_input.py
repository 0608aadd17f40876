"""A compare stage's folder as `align relabel` reads it, and the settings and principles that its labels get."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from align.constitution.constitution import Constitution, load_constitution
from align.engines.provenance import CONSTITUTION, PROVENANCE, read_constitution
from align.errors import FileProblems, InputError, Problem
from align.feedback.judged_revisions import FILES as REVISION_FILES
from align.feedback.judged_revisions import RevisionLabels, read_settings
from align.feedback.records import Comparison
from align.pipeline.recipe_files import apply_override
from align.records import read_rows
from align.run.artefacts import Manifest, read_manifest, require_run, require_unchanged, stage_folder
from align.settings.blocks import Block, JudgeBlock
from align.settings.validation import nearest, problems_from
from align.settings.yaml_files import Lines
from align.stages.compare import STAGE, CompareBlock

FREE = (
    "judge.clamp",
    "judge.min_margin",
    "judge.scale",
    "judge.min_option_mass",
    "judge.chain_of_thought_range",
    "compare.principle",
    "revise.principle",
)
"""Keys that only decide what becomes of the scores."""
FILES = ("comparisons.jsonl", "pairs.jsonl", "opinions.jsonl", CONSTITUTION, "agreement.json")


class LabelSettings(Block):
    """What labels depend on, besides the scores."""

    seed: int
    judge: JudgeBlock
    compare: CompareBlock
    revise: RevisionLabels | None = None


@dataclass(frozen=True)
class Labelled:
    """A compare stage's folder as it was read: its settings, those that its revisions were labelled by where it keeps
    their scores, and its constitution; rows stay in their files."""

    folder: Path
    manifest: Manifest
    constitution: Constitution
    revise: RevisionLabels | None

    def comparisons(self) -> Iterator[Comparison]:
        """The rows, read from the file."""
        return read_rows(self.folder / "comparisons.jsonl", Comparison)

    def first(self, key: str) -> str:
        """What the first comparison that has it says under `key`; empty where none does."""
        return next((found for row in self.comparisons() if (found := getattr(row, key))), "")


def read_labelled(source: Path) -> Labelled:
    """The compare stage of a run, or the stage's own folder.

    Raises:
        InputError: it is not there, keeps no scores, or its files are not what the stage wrote.
    """
    require_run(source, STAGE.name)
    folder = source if (source / "comparisons.jsonl").is_file() else stage_folder(source, STAGE.name)
    manifest = read_manifest(folder)
    if manifest is None or manifest.stage != STAGE.name:
        raise InputError(f"{source}: no finished `compare` in it; name its folder, or its run's")
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise InputError(f"{folder}: has no {missing[0]}, which this version's `compare` keeps; run `compare` again")
    for name in (*FILES, *(name for name in (*REVISION_FILES, PROVENANCE) if name in manifest.outputs)):
        require_unchanged(folder / name, manifest)
    return Labelled(folder, manifest, read_constitution(folder / CONSTITUTION), read_settings(folder))


def label_settings(labelled: Labelled, overrides: Sequence[str]) -> LabelSettings:
    """The stage's own settings with the overrides.

    Raises:
        InputError: a key decides more than what becomes of the scores, or a value is none that it can have.
    """
    stored = labelled.manifest.settings
    content: dict[str, Any] = {"seed": stored["seed"], "judge": stored["judge"], "compare": stored["settings"]}
    if labelled.revise:
        content["revise"] = labelled.revise.model_dump(mode="json")
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key.startswith("revise.") and not labelled.revise:
            raise InputError(f"--set {override}: no scores of revisions were kept in {labelled.folder}; leave it out")
        if key not in FREE:
            match = nearest(key, FREE, 0.8)
            remedy = f"did you mean `{match}`?" if match else "run `compare` again"
            raise InputError(f"--set {override}: labels are made again by {', '.join(FREE)} alone; {remedy}")
        try:
            apply_override(content, override)
        except ValueError as error:
            raise FileProblems("align relabel", [Problem(f"--set {override}", str(error))]) from None
    try:
        return LabelSettings.model_validate(content)
    except ValidationError as error:
        raise FileProblems("align relabel", problems_from(error, Lines(""), LabelSettings)) from None


def chosen_principles(labelled: Labelled, path: str | None, ids: Sequence[str]) -> Constitution:
    """The constitution that labels follow: the stage's own or another, with all its principles or some.

    Raises:
        InputError: it has no such principle.
    """
    constitution = load_constitution(path) if path else labelled.constitution
    known = [principle.id for principle in constitution.principles]
    if unknown := [name for name in ids if name not in known]:
        match = nearest(unknown[0], known)
        remedy = f"did you mean `{match}`?" if match else f"it has {', '.join(known)}"
        raise InputError(f"--principles {unknown[0]}: no such principle in '{constitution.id}'; {remedy}")
    if not ids:
        return constitution
    kept = tuple(principle for principle in constitution.principles if principle.id in ids)
    return constitution.model_copy(update={"principles": kept})
