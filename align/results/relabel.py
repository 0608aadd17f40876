"""`align relabel RUN --output DIR`: a compare stage's labels made again, by other settings, from the scores it kept.

No model is asked anything. The new folder holds what the stage's own does but its log and the gates' figures, so that
runs can be compared and trained on it: `pairs.jsonl` is a preference data set. Pairs of revisions are judged again
too, where their scores were kept; which revisions sft was trained on stays as it was.
"""

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from align.constitution.constitution import Constitution, Principle
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
from align.results.relabel_input import FILES, Labelled, LabelSettings, chosen_principles, label_settings, read_labelled
from align.run.artefacts import MANIFEST, NOT_RELABELLED, RELABELLED, Manifest, output_digests, write_json
from align.run.reproducibility import derive_seed, environment
from align.stages.compare import CALIBRATION, STAGE
from align.stages.revise import STAGE as REVISE

CARRIED = ("judge", "calibration")
"""Figures of the judge as it was tested, under the settings of then."""


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
    settings = label_settings(labelled, overrides)
    chosen = chosen_principles(labelled, constitution, principles)
    judge = recorded_judge(labelled, settings, chosen, STAGE.name, settings.compare.principle)
    _require_same_words(judge, labelled.constitution)
    unfinished = output.parent / f".{output.name}.partial"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        counted, measured = _write_labels(labelled, judge, settings, unfinished)
        _write_manifest(labelled, unfinished, settings, judge.constitution, counted, measured)
        unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return counted


def _write_labels(
    labelled: Labelled, judge: Judge, settings: LabelSettings, folder: Path
) -> tuple[dict[str, int], dict[str, Any]]:
    """Write all but the manifest, row by row; what that counts and measures."""
    entries, names = _relabelled(labelled, settings, judge.constitution)
    tally = ComparisonTally([principle.id for principle in judge.principles], judge.settings)
    counted = Counter(pairs=0, revision_pairs=0)
    with LabelFiles(folder, tally) as files:
        for row, scores in _judged_again(labelled, judge):
            comparison = with_provenance(row, row.provenance, names.get(row.judge_provenance, ""))
            files.add(comparison, scores)
            if pair := comparison_pair(comparison):
                counted["pairs"] += files.add_pair(pair)
        for pair in _pairs_of_revisions(labelled, settings, judge.constitution, folder, names, counted):
            counted["revision_pairs"] += files.add_pair(pair)
    agreement = tally.agreement.agreement()
    write_rows(folder / PROVENANCE, entries)
    write_json(folder / "agreement.json", agreement.as_json())
    write_constitution(folder, judge.constitution)
    kept = _carried_over(labelled, folder)
    if files.repeated:
        counted["pairs_repeated"] = files.repeated
    return {**tally.counts(), **counted}, {**kept, **tally.figures(), "agreement": agreement_figures(agreement)}


def _pairs_of_revisions(
    labelled: Labelled,
    settings: LabelSettings,
    constitution: Constitution,
    folder: Path,
    names: Mapping[str, str],
    counted: Counter[str],
) -> Iterator[PreferencePair]:
    """By the verdicts that the revisions' scores give now, which are kept in the folder; where none were kept, as they
    were."""
    if settings.revise:
        judge = recorded_judge(labelled, settings, constitution, REVISE.name, settings.revise.principle)
        verdict_of = partial(_verdict, judge, OPINIONS)
        yield from revision_pairs(rejudge(labelled.folder, folder, settings.revise, verdict_of, names), counted)
        return
    for pair in read_rows(labelled.folder / "pairs.jsonl", PreferencePair):
        if pair.source == "revision":
            counted[NOT_RELABELLED] += 1
            yield pair


def _carried_over(labelled: Labelled, folder: Path) -> dict[str, Any]:
    """Keep what `compare` found its judge to be worth; its figures."""
    if (tested := labelled.folder / CALIBRATION).is_file():
        shutil.copyfile(tested, folder / CALIBRATION)
    return {name: found for name in CARRIED if (found := labelled.manifest.figures.get(name))}


def _judged_again(labelled: Labelled, judge: Judge) -> Iterator[tuple[Comparison, tuple[OpinionScores, ...]]]:
    """Each comparison with the verdict that its scores give now; the two files are in the same order.

    Raises:
        InputError: a principle that counts was never asked about.
    """
    for row, scores in with_scores(labelled.comparisons(), labelled.folder / "opinions.jsonl", lambda row: row.id):
        if not row.judge:
            yield row, ()
            continue
        verdict = _verdict(judge, "opinions.jsonl", question_of(row), scores)
        yield with_verdict(row, verdict, judge.name), verdict.scores


def _verdict(judge: Judge, file: str, question: Question, scores: Sequence[OpinionScores]) -> Verdict:
    """The verdict that scores of a file give now.

    Raises:
        InputError: a principle that counts was never asked about.
    """
    try:
        return judge.verdict(question, by_principle(scores))
    except KeyError as error:
        raise InputError(_never_asked(file, f"about principle {error}, which these labels need")) from None


def recorded_judge(
    labelled: Labelled, settings: LabelSettings, constitution: Constitution, stage: str, principle: str
) -> Judge:
    """A judge that gives again the opinions that are stored, under these settings.

    Args:
        stage: the one that asked, with whose seed principles are drawn.
        principle: `all`, or `draw` for one a question.

    Raises:
        InputError: the constitution lacks what this kind of judge needs.
    """
    name = labelled.first("judge").partition(":")[2]
    engine = RecordedEngine(name) if settings.judge.kind != "rule" else None
    draw_seed = derive_seed(settings.seed, stage) if principle == "draw" else None
    # Worked choices were shown when the judge was asked; now it is asked nothing.
    return Judge(constitution, settings.judge.model_copy(update={"examples": 0}), engine, draw_seed=draw_seed)


def _require_same_words(judge: Judge, stored: Constitution) -> None:
    """What the engine gave counts for principles that still say what it was asked about."""
    if judge.settings.kind == "rule":
        return
    known = {principle.id: _asked_words(stored, principle) for principle in stored.principles}
    for principle in judge.principles:
        if known.get(principle.id) != _asked_words(judge.constitution, principle):
            asked = f"about principle '{principle.id}' in these words and beside these documents"
            raise InputError(_never_asked("opinions.jsonl", asked))


def _asked_words(constitution: Constitution, principle: Principle) -> tuple[str | None, ...]:
    shown = [constitution.documents.get(source, source) for source in constitution.sources_of(principle)]
    passages = (*shown, str(constitution.passages)) if shown else ()
    return principle.question, principle.text, principle.opposite, principle.language, *passages


def _never_asked(file: str, what: str) -> str:
    return (
        f"{file}: the judge was never asked {what}; leave it out with --principles, or run `compare` with "
        "these settings"
    )


def _relabelled(
    labelled: Labelled, settings: LabelSettings, constitution: Constitution
) -> tuple[list[Provenance], dict[str, str]]:
    """The stage's entries, those of its labels as they are now; and what these are called, by what they were."""
    entries = read_provenance(labelled.folder)
    principles = {labelled.first("judge_provenance"): settings.compare.principle}
    if settings.revise:
        of_revisions = next((row.judge_provenance for row, _ in read_judged_revisions(labelled.folder)), "")
        principles[of_revisions] = settings.revise.principle
    now = {
        name: entries[name].with_label(settings.judge, constitution, principle=principle)
        for name, principle in principles.items()
        if name in entries
    }
    return [now.get(name, entry) for name, entry in entries.items()], {name: entry.id for name, entry in now.items()}


def _write_manifest(
    labelled: Labelled,
    output: Path,
    settings: LabelSettings,
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
    if settings.revise:
        own["revise"] = settings.revise.model_dump(mode="json")
    written = [name for name in (*FILES, *REVISION_FILES, CALIBRATION, PROVENANCE) if (output / name).exists()]
    inputs = {RELABELLED: labelled.manifest.content_digest}
    manifest = Manifest(
        stage=STAGE.name,
        fingerprint=digest({"slice": own, "inputs": inputs}),
        settings=labelled.manifest.settings | own,
        inputs=inputs,
        outputs=output_digests(output, written),
        counts=dict(counted),
        figures=dict(measured),
        environment=environment(),
    )
    write_json(output / MANIFEST, manifest.__dict__)
