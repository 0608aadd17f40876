"""The revisions that a judge was asked about, and what its engine gave.

`compare` keeps those that it makes pairs of, so that its folder alone has all that `align relabel` makes labels of.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, ValidationError

from align.errors import InputError
from align.feedback.records import JUDGED_WORSE, NEAR_DUPLICATE, OpinionScores, Revision
from align.records import R, Sample, read_rows
from align.run import processes
from align.run.artefacts import read_manifest, write_json
from align.run.streaming import RowFiles
from align.settings.blocks import Block, Fraction

if TYPE_CHECKING:
    from align.feedback.judge import Verdict
    from align.feedback.near_duplicates import NearDuplicates
    from align.feedback.opinions import Question

REVISE_OPINIONS = "opinions.jsonl"
REVISIONS, OPINIONS, SETTINGS = "judged_revisions.jsonl", "revision_opinions.jsonl", "revision_settings.json"
FILES = (REVISIONS, OPINIONS, SETTINGS)

Scores = tuple[OpinionScores, ...]


class RevisionLabels(Block):
    """What of revise's own settings decides which revisions become pairs, and with which label."""

    principle: Literal["all", "draw"] = Field(description="all principles that apply, or one for each revision")
    near_duplicates: Fraction | None = Field(description="similarity to an earlier accepted one that rejects")


class KeptRevisions(RowFiles):
    """The three files of a folder, written row by row."""

    def __init__(self, folder: Path, settings: RevisionLabels) -> None:
        super().__init__(folder, REVISIONS, OPINIONS)
        self._revisions, self._opinions = self._files
        if processes.is_first():
            write_json(folder / SETTINGS, settings.model_dump(mode="json"))

    def add(self, row: Revision, scores: Sequence[OpinionScores]) -> None:
        """A revision with its verdict, and what that was made of."""
        self._revisions.add(row)
        for each in scores:
            self._opinions.add(each)


def read_kept(folder: Path) -> Iterator[tuple[Revision, Scores]]:
    """What a folder's files hold, in their order."""
    return with_scores(read_rows(folder / REVISIONS, Revision), folder / OPINIONS, _sample_id)


def read_settings(folder: Path) -> RevisionLabels | None:
    """Those that a folder's revisions were labelled by; None where it keeps none.

    Raises:
        InputError: the file is damaged.
    """
    path = folder / SETTINGS
    if not path.is_file():
        return None
    try:
        return RevisionLabels.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise InputError(
            f"{path}: damaged, or of another version ({error.error_count()} faults); remove {folder} and run again"
        ) from None


def settings_of(revise: Path) -> RevisionLabels | None:
    """Those of a revise stage; None of one that kept no scores, as earlier versions."""
    manifest = read_manifest(revise)
    if manifest is None or not (revise / REVISE_OPINIONS).is_file():
        return None
    own = manifest.settings["settings"]
    return RevisionLabels.model_validate({name: own[name] for name in RevisionLabels.model_fields})


def judged_in(revise: Path, samples: Path) -> Iterator[tuple[Revision, Scores]]:
    """The revisions of a revise stage that came before its judge, accepted or not, in the order of the samples."""
    waiting = [
        (rows, next(rows, None))
        for rows in (read_rows(revise / name, Revision) for name in ("revisions.jsonl", "rejected.jsonl"))
    ]

    def in_order() -> Iterator[Revision]:
        for sample in read_rows(samples, Sample):
            for place, (rows, row) in enumerate(waiting):
                if row is not None and row.sample_id == sample.id:
                    waiting[place] = rows, next(rows, None)
                    yield row

    judged = (row for row in in_order() if row.judge_provenance)
    return with_scores(judged, revise / REVISE_OPINIONS, _sample_id)


def with_scores(rows: Iterable[R], opinions: Path, id_of: Callable[[R], str]) -> Iterator[tuple[R, Scores]]:
    """Each row with its own scores; the file has them in the rows' order.

    Args:
        id_of: what the scores call a row.
    """
    stored = itertools.groupby(read_rows(opinions, OpinionScores), key=lambda each: each.comparison_id)
    ahead = next(stored, None)
    for row in rows:
        scores: Scores = ()
        if ahead is not None and ahead[0] == id_of(row):
            scores = tuple(ahead[1])
            ahead = next(stored, None)
        yield row, scores


def by_principle(scores: Iterable[OpinionScores]) -> dict[str, Scores]:
    """Scores by the ids of the principles."""
    found: dict[str, Scores] = {}
    for each in scores:
        found[each.principle_id] = (*found.get(each.principle_id, ()), each)
    return found


def judged_again(
    source: Path,
    output: Path,
    settings: RevisionLabels,
    verdict_of: Callable[["Question", Scores], "Verdict"],
    names: Mapping[str, str],
) -> Iterator[Revision]:
    """The revisions that one folder keeps as other verdicts leave them, kept in another folder as they pass.

    Args:
        verdict_of: what a judge says to a question, by the scores that were kept for it.
        names: of the provenance of labels, what each entry is called now.
    """
    earlier = near_duplicates(settings.near_duplicates)
    with KeptRevisions(output, settings) as kept:
        for row, scores in read_kept(source):
            verdict = verdict_of(question_of(row), scores)
            judged = replace(with_verdict(row, verdict), judge_provenance=names.get(row.judge_provenance, ""))
            now = unless_repeated(judged, earlier)
            kept.add(now, verdict.scores)
            yield now


def question_of(row: Revision) -> "Question":
    """What a judge is asked about a revision: whether it is better than its original."""
    from align.feedback.opinions import Question

    return Question(row.sample_id, row.prompt, row.completion, row.original, row.category)


def with_verdict(row: Revision, verdict: "Verdict") -> Revision:
    """The revision as a verdict leaves it: accepted where it is more likely better than its original than not."""
    p_better = 0.5 if verdict.p_a is None else verdict.p_a
    accepted = p_better > 0.5
    reason = "" if accepted else verdict.reason or JUDGED_WORSE
    return replace(row, p_better=p_better, accepted=accepted, reason=reason, judged_by=verdict.decided_by)


def near_duplicates(similarity: float | None) -> "NearDuplicates | None":
    """What remembers the accepted revisions; None where they may repeat one another."""
    from align.feedback.near_duplicates import NearDuplicates

    return None if similarity is None else NearDuplicates(similarity)


def unless_repeated(row: Revision, earlier: "NearDuplicates | None") -> Revision:
    """The revision, rejected where it nearly repeats an earlier accepted one of its split; else it is remembered."""
    if row.accepted and earlier is not None and earlier.is_repeated(row.completion, row.split):
        return replace(row, accepted=False, reason=NEAR_DUPLICATE)
    return row


def _sample_id(row: Revision) -> str:
    return row.sample_id
