"""`align relabel RUN --output DIR`: recomputes the labels of a finished `compare` from the scores that it kept.

Settings, constitution and principles may differ from the run's; no model is asked again. The new folder holds what the
`compare` folder does, except its log and the gates' figures. Its `pairs.jsonl` is a preference data set to train on.
Revision pairs are relabelled too if the revisions' scores were kept; the revisions that SFT was trained on stay.
"""

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from align.constitution.constitution import Constitution
from align.constitution.principles import Principle
from align.engines.provenance import PROVENANCE, Provenance, read_provenance, write_constitution
from align.engines.recorded import RecordedEngine
from align.errors import InputError
from align.feedback.agreement import agreement_figures
from align.feedback.judge import Judge, Verdict
from align.feedback.judged_revisions import (
    OPINIONS,
    REVISION_FILES,
    by_principle,
    read_judged_revisions,
    rejudge,
    with_scores,
)
from align.feedback.label_files import LabelFiles
from align.feedback.opinions import Question
from align.feedback.preference_pairs import comparison_pair, question_of, revision_pairs, with_provenance, with_verdict
from align.feedback.records import Comparison, OpinionScores
from align.feedback.tallies import ComparisonTally
from align.records import PreferencePair, digest, read_rows, write_rows
from align.results.relabel_input import LABEL_FILES, CompareFolder, LabelSettings, read_compare_folder
from align.run.artefacts import MANIFEST, NOT_RELABELLED, RELABELLED, Manifest, output_digests, write_json
from align.run.reproducibility import derive_seed, environment
from align.stages.compare import CALIBRATION, STAGE
from align.stages.revise import STAGE as REVISE

JUDGE_FIGURES = ("judge", "calibration")
"""The figures of the judge's tests. They are copied: the judge was tested with the run's own settings."""


def relabel(
    source: Path,
    output: Path,
    *,
    overrides: Sequence[str] = (),
    constitution: str | None = None,
    principles: Sequence[str] = (),
) -> dict[str, int]:
    """Write the relabelled pairs of a finished `compare` to `output`; returns the counts of the new manifest.

    Args:
        source: a run's folder, or its `compare` folder.
        overrides: `key=value` texts, with keys among `RELABEL_KEYS`.
        constitution: a file whose principles, weights, tiers and rules replace those of the run.
        principles: the ids of the principles that count; all if empty.

    Raises:
        InputError: `compare` is not done, the output exists, or the settings need scores that were not kept.
    """
    if output.exists():
        raise InputError(f"{output}: already exists; name a new folder with --output")
    compared = read_compare_folder(source)
    settings = compared.settings_with(overrides)
    chosen = compared.constitution_with(constitution, principles)
    judge = recorded_judge(compared, settings, chosen, STAGE.name, settings.compare.principle)
    _require_same_questions(judge, compared.constitution)
    partial_folder = output.parent / f".{output.name}.partial"
    shutil.rmtree(partial_folder, ignore_errors=True)
    partial_folder.mkdir(parents=True)
    try:
        counts, figures = _write_labels(compared, judge, settings, partial_folder)
        _write_manifest(compared, partial_folder, settings, judge.constitution, counts, figures)
        partial_folder.rename(output)
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)
    return counts


def _write_labels(
    compared: CompareFolder, judge: Judge, settings: LabelSettings, folder: Path
) -> tuple[dict[str, int], dict[str, Any]]:
    """Write every file but the manifest, row by row; returns counts and figures for the manifest."""
    entries, new_ids = _relabelled_provenance(compared, settings, judge.constitution)
    tally = ComparisonTally([principle.id for principle in judge.principles], judge.settings)
    counts = Counter(pairs=0, revision_pairs=0)
    with LabelFiles(folder, tally) as files:
        for row, scores in _rejudged(compared, judge):
            comparison = with_provenance(row, row.provenance, new_ids.get(row.judge_provenance, ""))
            files.add(comparison, scores)
            if pair := comparison_pair(comparison):
                counts["pairs"] += files.add_pair(pair)
        for pair in _revision_pairs(compared, settings, judge.constitution, folder, new_ids, counts):
            counts["revision_pairs"] += files.add_pair(pair)
    agreement = tally.agreement.agreement()
    write_rows(folder / PROVENANCE, entries)
    write_json(folder / "agreement.json", agreement.as_json())
    write_constitution(folder, judge.constitution)
    judge_figures = _copy_judge_tests(compared, folder)
    if files.repeated:
        counts["pairs_repeated"] = files.repeated
    return {**tally.counts(), **counts}, {**judge_figures, **tally.figures(), "agreement": agreement_figures(agreement)}


def _revision_pairs(
    compared: CompareFolder,
    settings: LabelSettings,
    constitution: Constitution,
    folder: Path,
    new_ids: Mapping[str, str],
    counts: Counter[str],
) -> Iterator[PreferencePair]:
    """The revision pairs, relabelled from the scores of the revisions; unchanged if no scores were kept.

    The new verdicts on the revisions are written to the folder.
    """
    if settings.revise:
        judge = recorded_judge(compared, settings, constitution, REVISE.name, settings.revise.principle)
        verdict_of = partial(_verdict, judge, OPINIONS)
        yield from revision_pairs(rejudge(compared.folder, folder, settings.revise, verdict_of, new_ids), counts)
        return
    for pair in read_rows(compared.folder / "pairs.jsonl", PreferencePair):
        if pair.source == "revision":
            counts[NOT_RELABELLED] += 1
            yield pair


def _copy_judge_tests(compared: CompareFolder, folder: Path) -> dict[str, Any]:
    """Copy the results of the judge's calibration; returns the figures of its tests."""
    if (tested := compared.folder / CALIBRATION).is_file():
        shutil.copyfile(tested, folder / CALIBRATION)
    return {name: value for name in JUDGE_FIGURES if (value := compared.manifest.figures.get(name))}


def _rejudged(compared: CompareFolder, judge: Judge) -> Iterator[tuple[Comparison, tuple[OpinionScores, ...]]]:
    """Each comparison with the verdict recomputed from its scores; the two files are in the same order."""
    for row, scores in with_scores(compared.comparisons(), compared.folder / "opinions.jsonl", lambda row: row.id):
        if not row.judge:
            yield row, ()
            continue
        verdict = _verdict(judge, "opinions.jsonl", question_of(row), scores)
        yield with_verdict(row, verdict, judge.name), verdict.scores


def _verdict(judge: Judge, file: str, question: Question, scores: Sequence[OpinionScores]) -> Verdict:
    """The verdict recomputed from scores, which come from `file`.

    Raises:
        InputError: the judge was never asked about a principle that counts.
    """
    try:
        return judge.verdict(question, by_principle(scores))
    except KeyError as error:
        raise InputError(_never_asked(file, f"about principle {error}, which these labels need")) from None


def recorded_judge(
    compared: CompareFolder, settings: LabelSettings, constitution: Constitution, stage: str, principle: str
) -> Judge:
    """A judge that decides by these settings from stored scores, and never asks a model.

    Args:
        stage: the stage whose judge gave the scores; principles are drawn with its seed.
        principle: `all`, or `draw` for one principle a question.

    Raises:
        InputError: the constitution lacks what this kind of judge needs.
    """
    name = compared.first_value("judge").partition(":")[2]
    engine = RecordedEngine(name) if settings.judge.kind != "rule" else None
    draw_seed = derive_seed(settings.seed, stage) if principle == "draw" else None
    # Worked choices only matter when a judge is asked, and this one never is.
    return Judge(constitution, settings.judge.model_copy(update={"examples": 0}), engine, draw_seed=draw_seed)


def _require_same_questions(judge: Judge, stored: Constitution) -> None:
    """Refuse principles whose text has changed since the judge was asked: the stored scores do not apply to them."""
    if judge.settings.kind == "rule":
        return
    known = {principle.id: _question_texts(stored, principle) for principle in stored.principles}
    for principle in judge.principles:
        if known.get(principle.id) != _question_texts(judge.constitution, principle):
            asked = f"about principle '{principle.id}' with this text and these documents"
            raise InputError(_never_asked("opinions.jsonl", asked))


def _question_texts(constitution: Constitution, principle: Principle) -> tuple[str | None, ...]:
    shown = [constitution.documents.get(source, source) for source in constitution.sources_of(principle)]
    passages = (*shown, str(constitution.passages)) if shown else ()
    return principle.question, principle.text, principle.opposite, principle.language, *passages


def _never_asked(file: str, what: str) -> str:
    return (
        f"{file}: the judge was never asked {what}; leave it out with --principles, or run `compare` with "
        "these settings"
    )


def _relabelled_provenance(
    compared: CompareFolder, settings: LabelSettings, constitution: Constitution
) -> tuple[list[Provenance], dict[str, str]]:
    """The provenance entries with those of the labels updated, and the new id of each updated entry by its old one."""
    entries = read_provenance(compared.folder)
    principles = {compared.first_value("judge_provenance"): settings.compare.principle}
    if settings.revise:
        revision_entry = next((row.judge_provenance for row, _ in read_judged_revisions(compared.folder)), "")
        principles[revision_entry] = settings.revise.principle
    updated = {
        name: entries[name].with_label(settings.judge, constitution, principle=principle)
        for name, principle in principles.items()
        if name in entries
    }
    new_entries = [updated.get(name, entry) for name, entry in entries.items()]
    return new_entries, {name: entry.id for name, entry in updated.items()}


def _write_manifest(
    compared: CompareFolder,
    output: Path,
    settings: LabelSettings,
    constitution: Constitution,
    counts: Mapping[str, int],
    figures: Mapping[str, Any],
) -> None:
    """Write the manifest, last of all files: a folder with a manifest is complete."""
    own = {
        "stage": STAGE.name,
        "seed": settings.seed,
        "settings": settings.compare.model_dump(mode="json"),
        "judge": settings.judge.model_dump(mode="json"),
        "constitution": {"id": constitution.id, "digest": constitution.digest},
    }
    if settings.revise:
        own["revise"] = settings.revise.model_dump(mode="json")
    written = [name for name in (*LABEL_FILES, *REVISION_FILES, CALIBRATION, PROVENANCE) if (output / name).exists()]
    inputs = {RELABELLED: compared.manifest.content_digest}
    manifest = Manifest(
        stage=STAGE.name,
        fingerprint=digest({"slice": own, "inputs": inputs}),
        settings=compared.manifest.settings | own,
        inputs=inputs,
        outputs=output_digests(output, written),
        counts=dict(counts),
        figures=dict(figures),
        environment=environment(),
    )
    write_json(output / MANIFEST, manifest.__dict__)
