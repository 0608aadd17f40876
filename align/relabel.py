"""`align relabel RUN --output DIR`: a compare stage's labels made again, by other settings, from the scores it kept.

No model is asked anything. The new folder holds what the stage's own does, so that runs can be compared and trained on
it: `pairs.jsonl` is a preference data set.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from align.artefacts import MANIFEST, Manifest, output_digests, read_manifest, require_run, stage_folder, write_json
from align.backends.recorded import RecordedBackend
from align.config import Block, JudgeBlock
from align.constitution import Constitution, load_constitution
from align.errors import FileProblems, InputError, Problem
from align.feedback.agreement import agreement_figures
from align.feedback.judge import Judge
from align.feedback.tallies import ComparisonTally
from align.recipe_files import apply_override
from align.records import Comparison, OpinionScores, PreferencePair, digest, read_rows, write_rows
from align.repro import derive_seed, environment
from align.stages.compare import STAGE, CompareBlock, label, pair_of
from align.yaml_files import Lines, problems_from

FREE = (
    "judge.clamp",
    "judge.min_margin",
    "judge.scale",
    "judge.min_option_mass",
    "judge.chain_of_thought_range",
    "compare.principle",
)
"""Keys that only decide what becomes of the scores."""
FILES = ("comparisons.jsonl", "pairs.jsonl", "opinions.jsonl", "constitution.json", "agreement.json")


class _Settings(Block):
    """What labels depend on, besides the scores."""

    seed: int
    judge: JudgeBlock
    compare: CompareBlock


@dataclass(frozen=True)
class Labelled:
    """A compare stage's folder as it was read: its settings, its constitution and its rows."""

    folder: Path
    manifest: Manifest
    constitution: Constitution
    comparisons: list[Comparison]
    opinions: list[OpinionScores]
    pairs: list[PreferencePair]


def relabel(
    source: Path,
    output: Path,
    *,
    overrides: Sequence[str] = (),
    constitution: str | None = None,
    principles: Sequence[str] = (),
) -> dict[str, int]:
    """Make a compare stage's labels again into `output`; returns the counts of its manifest.

    Args:
        source: the stage's folder, or that of its run.
        overrides: `key=value` texts, of the keys in `FREE`.
        constitution: a file whose weights, tiers, rules and choice of principles are taken instead of the stage's own.
        principles: the ids of those that count; all without them.

    Raises:
        InputError: there are no labels, the output is there already, or the settings need answers that were not kept.
    """
    if output.exists():
        raise InputError(f"{output}: is there already; name a new folder with --output")
    labelled = read_labelled(source)
    settings = _settings(labelled.manifest, overrides)
    judge = recorded_judge(labelled, settings, _chosen(labelled, constitution, principles))
    rows = [_unjudged(row) if row.judge else row for row in labelled.comparisons]
    answered = label(rows, judge)
    comparisons = [row for row, _ in answered]
    tally = ComparisonTally([principle.id for principle in judge.principles], judge.block.min_margin)
    for row, scores in answered:
        tally.add(row, scores)
    agreement = tally.agreement.agreement()
    judged = [pair for row in comparisons if (pair := pair_of(row))]
    kept = [pair for pair in labelled.pairs if pair.source == "revision"]
    output.mkdir(parents=True)
    write_rows(output / "comparisons.jsonl", comparisons)
    write_rows(output / "pairs.jsonl", _first_of_each([*judged, *kept]))
    write_rows(output / "opinions.jsonl", (each for _, scores in answered for each in scores))
    write_json(output / "agreement.json", agreement.as_json())
    write_json(output / "constitution.json", judge.constitution.model_dump(mode="json"))
    counted = {**tally.counts(), "pairs": len(judged)}
    measured = {**tally.figures(), "agreement": agreement_figures(agreement)}
    _write_manifest(labelled, output, settings, judge.constitution, counted, measured)
    return counted


def read_labelled(source: Path) -> Labelled:
    """The compare stage of a run, or the stage's own folder.

    Raises:
        InputError: it is not there, or keeps no scores.
    """
    require_run(source, STAGE.name)
    folder = source if (source / "comparisons.jsonl").is_file() else stage_folder(source, STAGE.name)
    manifest = read_manifest(folder)
    if manifest is None or manifest.stage != STAGE.name:
        raise InputError(f"{source}: no finished `compare` in it; name its folder, or its run's")
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise InputError(f"{folder}: has no {missing[0]}, which this version's `compare` keeps; run `compare` again")
    return Labelled(
        folder,
        manifest,
        _stored_constitution(folder / "constitution.json"),
        list(read_rows(folder / "comparisons.jsonl", Comparison)),
        list(read_rows(folder / "opinions.jsonl", OpinionScores)),
        list(read_rows(folder / "pairs.jsonl", PreferencePair)),
    )


def recorded_judge(labelled: Labelled, settings: _Settings, constitution: Constitution) -> Judge:
    """A judge that gives again the opinions that are stored, under these settings.

    Raises:
        InputError: the constitution lacks what this kind of judge needs.
    """
    seed = derive_seed(settings.seed, STAGE.name)
    name = next((row.judge.partition(":")[2] for row in labelled.comparisons if row.judge), "")
    backend = RecordedBackend(labelled.opinions, name) if settings.judge.kind != "rule" else None
    draw_seed = seed if settings.compare.principle == "draw" else None
    return Judge(constitution, settings.judge, backend, draw_seed=draw_seed, seed=seed)


def _stored_constitution(path: Path) -> Constitution:
    try:
        return Constitution.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, ValidationError) as error:
        raise InputError(f"{path}: not a constitution of this version ({error}); run `compare` again") from None


def _settings(manifest: Manifest, overrides: Sequence[str]) -> _Settings:
    """The stage's own settings with the overrides."""
    stored = manifest.settings
    content: dict[str, Any] = {"seed": stored["seed"], "judge": stored["judge"], "compare": stored["settings"]}
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key not in FREE:
            raise InputError(f"--set {override}: labels are made again by {', '.join(FREE)} alone; run `compare` again")
        try:
            apply_override(content, override)
        except ValueError as error:
            raise FileProblems("align relabel", [Problem(f"--set {override}", str(error))]) from None
    try:
        return _Settings.model_validate(content)
    except ValidationError as error:
        raise FileProblems("align relabel", problems_from(error, Lines(""), _Settings)) from None


def _chosen(labelled: Labelled, path: str | None, ids: Sequence[str]) -> Constitution:
    """The constitution that labels follow: the stage's own or another, with all its principles or some."""
    constitution = load_constitution(path) if path else labelled.constitution
    known = [principle.id for principle in constitution.principles]
    if unknown := [name for name in ids if name not in known]:
        raise InputError(
            f"--principles {unknown[0]}: no such principle in '{constitution.id}'; it has {', '.join(known)}"
        )
    if not ids:
        return constitution
    kept = tuple(principle for principle in constitution.principles if principle.id in ids)
    return constitution.model_copy(update={"principles": kept})


def _first_of_each(pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
    """Of several pairs of the same two texts the first, as where they were made."""
    first: dict[str, PreferencePair] = {}
    for pair in pairs:
        first.setdefault(pair.id, pair)
    return list(first.values())


def _unjudged(row: Comparison) -> Comparison:
    return replace(row, p_a=None, p_a_by_principle={}, position_bias=0.0, reason="", judge="")


def _write_manifest(
    labelled: Labelled,
    output: Path,
    settings: _Settings,
    constitution: Constitution,
    counted: Mapping[str, int],
    measured: Mapping[str, Any],
) -> None:
    """Last of all, so that a folder with a manifest is complete."""
    own = {
        "stage": STAGE.name,
        "seed": settings.seed,
        "settings": settings.compare.model_dump(mode="json"),
        "judge": settings.judge.model_dump(mode="json"),
        "constitution": {"id": constitution.id, "digest": constitution.digest},
    }
    inputs = {"relabelled": labelled.manifest.content_digest}
    manifest = Manifest(
        stage=STAGE.name,
        fingerprint=digest({"slice": own, "inputs": inputs}),
        settings=labelled.manifest.settings | own,
        inputs=inputs,
        outputs=output_digests(output, FILES),
        counts=dict(counted),
        figures=dict(measured),
        environment=environment(),
    )
    write_json(output / MANIFEST, manifest.__dict__)
