"""`align constitution diff A B`: how two constitutions' texts differ, and the labels of the same pairs under each.

    align constitution diff constitutions/style-asking.yaml constitutions/style-telling.yaml \\
        --pairs runs/quickstart/style-asking-0a1b2c3d --html diff.html
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from align.cli.output import show_sheets
from align.constitution.loading import load_constitution
from align.evaluation.report import share_text
from align.figures.tables import Sheet, conversation_text, print_written
from align.results.constitution_diff import (
    PLACEBO,
    SEED,
    ConstitutionDiff,
    Labelling,
    diff_constitutions,
    file_beside,
    placebo_of,
)
from align.results.judged_pairs import drawn_pairs, judge_from_options, judge_of_run, pairs_of, probe_pairs
from align.results.label_diff import Movement
from align.run.artefacts import json_text, write_option_file

NONE = "–"


def print_diff(
    a: Path,
    b: Path,
    *,
    pairs: Path | None = None,
    kind: str | None = None,
    model: str | None = None,
    draws_principle: bool = False,
    null: Path | None = None,
    placebo: Path | None = None,
    limit: int = 300,
    html: Path | None = None,
    json: Path | None = None,
    console: Console | None = None,
) -> None:
    """Print how two constitutions differ, and write it as an HTML page and as JSON if files are named.

    Args:
        pairs: a run, or a file of pairs; by default the probes of both constitutions.
        kind, model: the judge; by default that of the run, or else a `rule` judge.
        draws_principle: draw one principle for each pair, as in the paper, and judge A with a second seed too.
        null: a paraphrase of A; by default `<A>-paraphrased.yaml` in A's folder.
        placebo: by default `placebo.yaml` in A's folder, or else the one shipped with the project.
        limit: the most pairs to judge, drawn by a hash of their id.

    Raises:
        InputError: a constitution is invalid or unusable with this judge, no pairs, or a file cannot be written.
    """
    run_judge = judge_of_run(pairs) if pairs and pairs.is_dir() else None
    settings = judge_from_options(kind, model, run_judge)
    settings = replace(settings, draws_principle=settings.draws_principle or draws_principle)
    found = pairs_of(pairs) if pairs else probe_pairs([load_constitution(a), load_constitution(b)])
    controls = (null or file_beside(a, f"{a.stem}-paraphrased.yaml"), placebo or placebo_of(a))
    diff = diff_constitutions((a, b), drawn_pairs(found, limit), settings, *controls)
    source = f"the pairs of {pairs}" if pairs else "the constitutions' own probes (for a run's pairs, add --pairs RUN)"
    console = console or Console()
    title = f"{diff.a.constitution.id} and {diff.b.constitution.id}"
    show_sheets(diff_sheets(diff, source), console, html, title)
    if json:
        write_option_file(json, json_text(diff.as_json()), "--json")
        print_written(json, console)


def diff_sheets(diff: ConstitutionDiff, source: str) -> Iterator[Sheet]:
    """The tables of a comparison, in the order they are shown."""
    yield _texts_sheet(diff)
    yield _judged_sheet(diff, source)
    yield _labels_sheet(diff)
    yield _principles_sheet(diff)
    if diff.shared:
        yield _shared_sheet(diff)
    yield from _largest_sheets(diff)


def _texts_sheet(diff: ConstitutionDiff) -> Sheet:
    rows = tuple((each.change, each.principle or NONE, each.key, each.text) for each in diff.texts)
    remark = "[-removed-] {+added+}" if rows else "The texts are the same."
    return Sheet("texts, from A to B", ("change", "principle", "key", "text"), rows, (remark,), labels=4)


def _judged_sheet(diff: ConstitutionDiff, source: str) -> Sheet:
    rows = tuple((each.role, each.constitution.key, _probes(each)) for each in (diff.a, diff.b, *diff.others))
    remarks = [f"Judge: {diff.judge}. It labelled {len(diff.pairs)} pairs: {source}."]
    remarks += [
        f"On the probes of {each.role}, the judge is not shown to be better than chance: its labels may be noise."
        for each in (diff.a, diff.b, *diff.others)
        if not diff.judge.startswith("rule") and (each.probes is None or each.probes.low <= 0.5)
    ]
    return Sheet("labellings", ("role", "constitution", "probes right"), rows, tuple(remarks), labels=2)


def _probes(each: Labelling) -> str:
    return f"{each.probes.accuracy:.0%} of {each.probes.n}" if each.probes else NONE


def _labels_sheet(diff: ConstitutionDiff) -> Sheet:
    columns = ("A compared with", "decided by A, by it, by both", "flipped", "mean change of p")
    rows = tuple((each.role, *_movement_cells(diff.moved(each))) for each in (diff.b, *diff.others))
    return Sheet("labels", columns, rows, tuple(_label_remarks(diff)), labels=1)


def _movement_cells(moved: Movement) -> tuple[str, str, str]:
    change = moved.change
    return (
        f"{moved.one}, {moved.other}, {moved.both} of {moved.pairs}",
        share_text(moved.flipped) if moved.flipped else NONE,
        f"{change.mean:.3f}\n[{change.low:.3f}, {change.high:.3f}]",
    )


def _label_remarks(diff: ConstitutionDiff) -> Iterator[str]:
    yield "Intervals are 95%, over prompts. Flipped: of the pairs that both decide. Undecided pairs have p = 0.5."
    if diff.nulls and diff.beyond_null is None:
        yield "No pair is decided by both: whether B flips more labels than the null band cannot be said."
    elif diff.beyond_null is None:
        yield "No null band: name a paraphrase of A with --null FILE to see what wording alone changes."
    else:
        word = "more" if diff.beyond_null else "no more"
        yield f"B flips {word} labels than the null band (by intervals that do not overlap)."
    if not any(each.role == SEED for each in diff.others):
        yield "The judge samples nothing: another seed gives the same labels, so it adds nothing to the null band."
    placebo = [each for each in diff.others if each.role == PLACEBO]
    if not placebo:
        yield "No placebo: name a constitution that is irrelevant to the pairs with --placebo FILE."
    for each in placebo:
        moved = diff.moved(each)
        yield (
            f"The placebo decides {moved.other} of {moved.pairs} pairs, by the judge's own taste. If half of them flip "
            "from A, A's labels owe nothing to that taste; the fewer flip, the more they owe to it."
        )


def _principles_sheet(diff: ConstitutionDiff) -> Sheet:
    columns = ("of", "principle", "decided", "agrees with A", "agrees with B", "flips for A", "flips for B")
    rows = []
    for each in diff.pulls:
        flips = (str(each.to_a), str(each.to_b))
        rows.append((each.owner, each.principle, str(each.decided), _share(each.with_a), _share(each.with_b), *flips))
    remark = "Flips for A (B): flipped pairs on which the principle sides with A's (B's) label."
    return Sheet("agreement of each principle with the labels", columns, tuple(rows), (remark,), labels=2)


def _shared_sheet(diff: ConstitutionDiff) -> Sheet:
    rows = tuple((each.principle, *_movement_cells(each.movement)) for each in diff.shared)
    columns = ("principle", "decided by A's, by B's, by both", "flipped", "mean change of p")
    return Sheet("principles whose id is in both constitutions, each judged alone", columns, rows)


def _largest_sheets(diff: ConstitutionDiff) -> Iterator[Sheet]:
    for rank, index in enumerate(diff.largest, start=1):
        pair, one, other = diff.pairs[index], diff.a.labels[index], diff.b.labels[index]
        sides = (("first", pair.a, False), ("second", pair.b, True))
        rows = tuple((name, text, _p(one.p_a, is_b), _p(other.p_a, is_b)) for name, text, is_b in sides)
        by = "; ".join(
            f"{name}: " + ", ".join(f"{key} {p:.2f}" for key, p in label.by_principle.items())
            for name, label in (("A", one), ("B", other))
        )
        title = f"largest changes, no. {rank}: {conversation_text(pair.prompt)}"
        yield Sheet(title, ("completion", "text", "p under A", "p under B"), rows, (f"p(first) {by}",), labels=2)


def _p(p_a: float | None, is_b: bool) -> str:
    return "undecided" if p_a is None else f"{1 - p_a if is_b else p_a:.2f}"


def _share(share: float | None) -> str:
    return NONE if share is None else f"{share:.0%}"
