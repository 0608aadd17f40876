"""`align constitution stats RUN`: what each principle did in a run, and where principles agree and conflict.

align constitution stats runs/quickstart/style-asking-0a1b2c3d --constitution constitutions/style-asking.yaml
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from align.cli.output import show_sheets
from align.constitution.constitution import Constitution
from align.constitution.loading import load_constitution
from align.engines.provenance import CONSTITUTION, read_constitution
from align.errors import InputError
from align.feedback.agreement import Agreement, Label, Shares
from align.figures.tables import Sheet
from align.results.constitution_diff import labels_of, open_settings_judge
from align.results.constitution_stats import (
    PrincipleStats,
    RunRows,
    Share,
    conflicts_between_tiers,
    principle_stats,
    read_run,
    run_agreement,
)
from align.results.judged_pairs import COMPARE, CONSTITUTIONS, Pair, drawn_pairs, judge_of_run, preference_pairs
from align.run.artefacts import stage_folder

NONE = "–"


def print_stats(
    run: Path,
    constitution: Path | None = None,
    human: Path | None = None,
    limit: int = 300,
    console: Console | None = None,
) -> None:
    """Print a run's figures by principle.

    Args:
        constitution: the run's constitution, for its weights and tiers. By default it is the shipped file or the copy
            that the run's stages keep. It must be named only to judge human pairs by documents.
        human: preferences in TRL's format, for the run's judge to label.
        limit: the most human pairs to judge, drawn by a hash of their id.

    Raises:
        InputError: the run has no rows, the constitution is not the run's, or the pairs cannot be read or judged.
    """
    rows = read_run(run)
    known = _constitution_of(run, constitution)
    labelled = _judged(run, known, drawn_pairs(preference_pairs(human), limit)) if human else []
    show_sheets(stats_sheets(rows, known, labelled), console or Console())


def stats_sheets(
    rows: RunRows, constitution: Constitution | None, human: Sequence[tuple[Pair, Label]]
) -> Iterator[Sheet]:
    """The tables, in the order they are shown."""
    yield _principles_sheet(rows, constitution, human)
    agreement = run_agreement(rows, constitution)
    if len(agreement.principles) > 1:
        yield _matrix("agreement: how often two principles agree, where both decide", agreement, "agreement")
        remarks = _tier_remarks(agreement, constitution)
        yield _matrix("conflict: how often two principles are clear and disagree", agreement, "conflict", remarks)


def _principles_sheet(rows: RunRows, constitution: Constitution | None, human: Sequence[tuple[Pair, Label]]) -> Sheet:
    columns = ("principle", "drawn", "found fault", "accepted", "win rate", "with the rest", "with people")
    cells = tuple(_cells(each) for each in principle_stats(rows, constitution, human))
    remarks = [
        "Found fault: of non-empty critiques. Accepted: of revisions. Win rate: of revisions that the judge saw."
    ]
    remarks += [f"`{name}` is not done in this run, so its figures are {NONE}." for name in rows.missing]
    if not human:
        remarks.append("For agreement with people, name preferences with --human FILE; the run's judge labels them.")
    if constitution is None:
        remarks.append("Every weight counts as 1: name the run's constitution with --constitution FILE.")
    return Sheet("principles", columns, cells, tuple(remarks))


def _cells(each: PrincipleStats) -> tuple[str, ...]:
    shares = (each.drawn, each.found_fault, each.accepted, each.won, each.with_rest, each.with_people)
    return each.principle, *map(_share_text, shares)


def _share_text(share: Share) -> str:
    return NONE if share.value is None else f"{share.value:.0%}\n{share.hits:g} of {share.n}"


def _matrix(title: str, agreement: Agreement, name: str, remarks: tuple[str, ...] = ()) -> Sheet:
    shares: Shares = getattr(agreement, name)
    totals = agreement.decided if name == "agreement" else agreement.judged
    rows = tuple(
        (principle, *(NONE if share is None else f"{share:.0%}\nof {n}" for share, n in zip(row, counts, strict=True)))
        for principle, row, counts in zip(agreement.principles, shares, totals, strict=True)
    )
    return Sheet(title, ("", *agreement.principles), rows, remarks)


def _tier_remarks(agreement: Agreement, constitution: Constitution | None) -> tuple[str, ...]:
    if constitution is None or not constitution.tiers:
        return ()
    share = conflicts_between_tiers(agreement, constitution)
    return (f"Conflicts between tiers: the earlier tier's principle won {share.hits:g} of {share.n}.",)


def _constitution_of(run: Path, named: Path | None) -> Constitution | None:
    """The run's constitution: the named file, the shipped file whose key is the folder's name, or the run's copy."""
    folder = run.resolve().name
    if named:
        found = load_constitution(named)
        if found.key != folder:
            raise InputError(f"{named}: constitution {found.key}, but the run {run} used another; name the run's own")
        return found
    path = CONSTITUTIONS / f"{folder.rpartition('-')[0]}.yaml"
    shipped = load_constitution(path) if path.is_file() else None
    if shipped and shipped.key == folder:
        return shipped
    kept = (stage_folder(run, stage) / CONSTITUTION for stage in (COMPARE, "revise"))
    return next((read_constitution(path) for path in kept if path.is_file()), None)


def _lacks_documents(constitution: Constitution) -> bool:
    """Whether this is a run's copy, which names its documents by their digests instead of their folders."""
    return any(folder == digest for folder, digest in constitution.documents.items())


def _judged(run: Path, constitution: Constitution | None, pairs: Sequence[Pair]) -> list[tuple[Pair, Label]]:
    if constitution is None or _lacks_documents(constitution):
        raise InputError(f"{run}: judging human pairs needs its constitution file; name it with --constitution FILE")
    judge = open_settings_judge(constitution, judge_of_run(run))
    return list(zip(pairs, labels_of(judge, pairs), strict=True))
