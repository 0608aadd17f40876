"""The revisions that a judge compared with their originals, and the scores behind its verdicts.

`compare` copies those of its split into its own folder, so that `align relabel` needs no other folder.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from align.errors import InputError
from align.feedback.judge import Verdict
from align.feedback.near_duplicates import NearDuplicateIndex
from align.feedback.opinions import Question
from align.feedback.records import JUDGED_WORSE, NEAR_DUPLICATE, OpinionScores, Revision, Scores
from align.records import R, Sample, read_rows
from align.run import processes
from align.run.artefacts import read_manifest, write_json
from align.run.streaming import RowFiles
from align.settings.blocks import Block, Fraction

REVISE_OPINIONS = "opinions.jsonl"
REVISIONS, OPINIONS, SETTINGS = "judged_revisions.jsonl", "revision_opinions.jsonl", "revision_settings.json"
REVISION_FILES = (REVISIONS, OPINIONS, SETTINGS)


class RevisionLabelSettings(Block):
    """The settings of `revise` that decide which revisions become pairs, and with which label."""

    principle: Literal["all", "draw"] = Field(description="all principles that apply, or one drawn for each revision")
    near_duplicates: Fraction | None = Field(description="similarity to an earlier accepted one that rejects")


class JudgedRevisionFiles(RowFiles):
    """Writes a folder's three files of judged revisions, row by row."""

    def __init__(self, folder: Path, settings: RevisionLabelSettings) -> None:
        super().__init__(folder, REVISIONS, OPINIONS)
        self._revisions, self._opinions = self._files
        if processes.is_first():
            write_json(folder / SETTINGS, settings.model_dump(mode="json"))

    def add(self, row: Revision, scores: Sequence[OpinionScores]) -> None:
        """Add a revision with its verdict, and the scores behind the verdict."""
        self._revisions.add(row)
        for each in scores:
            self._opinions.add(each)


def read_judged_revisions(folder: Path) -> Iterator[tuple[Revision, Scores]]:
    """The judged revisions in a folder, in order, each with its scores."""
    return with_scores(read_rows(folder / REVISIONS, Revision), folder / OPINIONS, attrgetter("sample_id"))


def read_settings(folder: Path) -> RevisionLabelSettings | None:
    """The settings that a folder's revisions were labelled with; None if it has no such file.

    Raises:
        InputError: the file is damaged or was written by another version.
    """
    path = folder / SETTINGS
    if not path.is_file():
        return None
    try:
        return RevisionLabelSettings.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise InputError(
            f"{path}: damaged, or of another version ({error.error_count()} faults); remove {folder} and run again"
        ) from None


def stage_settings(revise: Path) -> RevisionLabelSettings | None:
    """The settings of a revise stage; None if it kept no scores, as in earlier versions."""
    manifest = read_manifest(revise)
    if manifest is None or not (revise / REVISE_OPINIONS).is_file():
        return None
    settings = manifest.settings["settings"]
    return RevisionLabelSettings.model_validate({name: settings[name] for name in RevisionLabelSettings.model_fields})


def judged_by_stage(revise: Path, samples: Path) -> Iterator[tuple[Revision, Scores]]:
    """The revisions that a revise stage's judge compared, accepted or not, in the order of the samples."""
    upcoming_rows = [
        (rows, next(rows, None))
        for rows in (read_rows(revise / name, Revision) for name in ("revisions.jsonl", "rejected.jsonl"))
    ]

    def in_order() -> Iterator[Revision]:
        for sample in read_rows(samples, Sample):
            for place, (rows, row) in enumerate(upcoming_rows):
                if row is not None and row.sample_id == sample.id:
                    upcoming_rows[place] = rows, next(rows, None)
                    yield row

    judged = (row for row in in_order() if row.judge_provenance)
    return with_scores(judged, revise / REVISE_OPINIONS, attrgetter("sample_id"))


def with_scores(rows: Iterable[R], opinions: Path, id_of: Callable[[R], str]) -> Iterator[tuple[R, Scores]]:
    """Each row with its scores, which the file has in the order of the rows.

    Args:
        id_of: gives the `comparison_id` of a row's scores.
    """
    stored = itertools.groupby(read_rows(opinions, OpinionScores), key=lambda each: each.comparison_id)
    upcoming = next(stored, None)
    for row in rows:
        scores: Scores = ()
        if upcoming is not None and upcoming[0] == id_of(row):
            scores = tuple(upcoming[1])
            upcoming = next(stored, None)
        yield row, scores


def by_principle(scores: Iterable[OpinionScores]) -> dict[str, Scores]:
    """The scores by principle id."""
    found: dict[str, Scores] = {}
    for each in scores:
        found[each.principle_id] = (*found.get(each.principle_id, ()), each)
    return found


def rejudge(
    source: Path,
    output: Path,
    settings: RevisionLabelSettings,
    verdict_of: Callable[[Question, Scores], Verdict],
    names: Mapping[str, str],
) -> Iterator[Revision]:
    """The judged revisions of the `source` folder under new verdicts, written to the `output` folder as they pass.

    Args:
        verdict_of: gives the new verdict on a question from its stored scores.
        names: new ids of the labels' provenance entries, by old id.
    """
    earlier = NearDuplicateIndex(settings.near_duplicates)
    with JudgedRevisionFiles(output, settings) as files:
        for row, scores in read_judged_revisions(source):
            verdict = verdict_of(question_of(row), scores)
            judged = replace(with_verdict(row, verdict), judge_provenance=names.get(row.judge_provenance, ""))
            now = reject_near_duplicate(judged, earlier)
            files.add(now, verdict.scores)
            yield now


def question_of(row: Revision) -> Question:
    """The question whether a revision (A) is better than its original (B)."""
    return Question(row.sample_id, row.prompt, row.completion, row.original, row.category)


def with_verdict(row: Revision, verdict: Verdict) -> Revision:
    """The revision with its verdict: accepted if it is probably better than its original."""
    p_better = 0.5 if verdict.p_a is None else verdict.p_a
    accepted = p_better > 0.5
    reason = "" if accepted else verdict.reason or JUDGED_WORSE
    return replace(row, p_better=p_better, accepted=accepted, reason=reason, judged_by=verdict.decided_by)


def reject_near_duplicate(row: Revision, earlier: NearDuplicateIndex) -> Revision:
    """The revision, rejected if it nearly repeats an earlier accepted one of its split; otherwise it is remembered."""
    if row.accepted and earlier.is_repeated(row.completion, row.split):
        return replace(row, accepted=False, reason=NEAR_DUPLICATE)
    return row
