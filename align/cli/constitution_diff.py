"""`align constitution diff A B`: the texts side by side, and how the labels of the same pairs move.

    align constitution diff constitutions/style-asking.yaml constitutions/style-telling.yaml \\
        --pairs runs/quickstart/style-asking-0a1b2c3d --html diff.html
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from align.constitution.constitution import load_constitution
from align.evaluation.report import share_text
from align.figures.tables import Sheet, conversation_text, page, print_sheet, print_written
from align.results.constitution_diff import PLACEBO, ConstitutionDiff, Labelling, beside, diff_constitutions, placebo_of
from align.results.judged_pairs import drawn_pairs, judge_of_run, named_judge, pairs_of, probe_pairs
from align.results.label_changes import Movement
from align.run.artefacts import json_text, write_option_file

NONE = "–"


def main(
    a: Path,
    b: Path,
    *,
    pairs: Path | None = None,
    kind: str | None = None,
    model: str | None = None,
    draws: bool = False,
    null: Path | None = None,
    placebo: Path | None = None,
    limit: int = 300,
    html: Path | None = None,
    json: Path | None = None,
    console: Console | None = None,
) -> None:
    """Print the difference of two constitutions, and write it as a page and as JSON where asked.

    Args:
        pairs: a run, or a file of pairs; without it the probes of both constitutions.
        kind, model: the judge; without them the run's own, or else by rule.
        draws: one principle is drawn for each pair, as in the paper, and A is judged with a second seed too.
        null: A in other words; `<A>-paraphrased.yaml` beside A without it.
        placebo: `placebo.yaml` beside A without it, or else the shipped one.
        limit: at most so many pairs, drawn by their content.

    Raises:
        InputError: a constitution's faults, no pairs, a judge that cannot read a constitution, a file not written.
    """
    run_judge = judge_of_run(pairs) if pairs and pairs.is_dir() else None
    settings = named_judge(kind, model, run_judge)
    settings = replace(settings, draws=settings.draws or draws)
    found = pairs_of(pairs) if pairs else probe_pairs([load_constitution(a), load_constitution(b)])
    diff = diff_constitutions(
        (a, b),
        drawn_pairs(found, limit),
        settings,
        null or beside(a, f"{a.stem}-paraphrased.yaml"),
        placebo or placebo_of(a),
    )
    source = f"pairs of {pairs}" if pairs else "the constitutions' own probes; --pairs RUN judges a run's pairs"
    sheets = list(diff_sheets(diff, source))
    console = console or Console()
    for sheet in sheets:
        print_sheet(sheet, console)
    if html:
        write_option_file(html, page(f"{diff.a.constitution.id} beside {diff.b.constitution.id}", sheets), "--html")
        print_written(html, console)
    if json:
        write_option_file(json, json_text(diff.as_json()), "--json")
        print_written(json, console)


def diff_sheets(diff: ConstitutionDiff, source: str) -> Iterator[Sheet]:
    """The parts of a difference, in the order they are shown."""
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
    return Sheet("texts, from A to B", ("", "principle", "key", "text"), rows, (remark,), labels=4)


def _judged_sheet(diff: ConstitutionDiff, source: str) -> Sheet:
    rows = tuple((each.role, each.constitution.key, _probes(each)) for each in (diff.a, diff.b, *diff.others))
    remarks = [f"Judge {diff.judge}; {len(diff.pairs)} pairs: {source}."]
    remarks += [
        f"The judge of {each.role} is not shown to be better than chance on its probes: its labels may be noise."
        for each in (diff.a, diff.b, *diff.others)
        if not diff.judge.startswith("rule") and (each.probes is None or each.probes.low <= 0.5)
    ]
    return Sheet("who judged", ("", "constitution", "probes right"), rows, tuple(remarks), labels=2)


def _probes(each: Labelling) -> str:
    return f"{each.probes.accuracy:.0%} of {each.probes.n}" if each.probes else NONE


def _labels_sheet(diff: ConstitutionDiff) -> Sheet:
    columns = ("A beside", "decided by A, by it, by both", "flipped", "mean change of p")
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
    yield "Intervals are 95%, over prompts. Flipped: of the pairs that both decide; in the mean, undecided is 0.5."
    if diff.nulls and diff.beyond_null is None:
        yield "No pair is decided on both sides: whether B flips more labels than the null band cannot be said."
    elif diff.beyond_null is None:
        yield "No null band: name A in other words with --null FILE to see what wording alone changes."
    else:
        word = "more" if diff.beyond_null else "no more"
        yield f"B flips {word} labels than the null band, by whole intervals."
    if not any("seed" in each.role for each in diff.others):
        yield "The judge draws nothing: another seed gives the same labels, and is no null band of its own."
    placebo = [each for each in diff.others if each.role == PLACEBO]
    if not placebo:
        yield "No placebo: name a constitution that nothing turns on with --placebo FILE."
    for each in placebo:
        moved = diff.moved(each)
        yield (
            f"The placebo decides {moved.other} of {moved.pairs} pairs. What it decides is the judge's own taste: "
            "half flipped from A means that A's labels owe nothing to it, fewer that they do."
        )


def _principles_sheet(diff: ConstitutionDiff) -> Sheet:
    columns = ("of", "principle", "decided", "with A's label", "with B's label", "flips for A", "flips for B")
    rows = tuple(
        (
            each.owner,
            each.principle,
            str(each.decided),
            _share(each.with_a),
            _share(each.with_b),
            str(each.to_a),
            str(each.to_b),
        )
        for each in diff.pulls
    )
    remark = "Flips for A (B): flipped pairs on which the principle sides with A's (B's) label."
    return Sheet("where they part, principle by principle", columns, rows, (remark,), labels=2)


def _shared_sheet(diff: ConstitutionDiff) -> Sheet:
    rows = tuple((each.principle, *_movement_cells(each.movement)) for each in diff.shared)
    columns = ("principle of both", "decided by A's, by B's, by both", "flipped", "mean change of p")
    return Sheet("principles of one id, each judged alone", columns, rows)


def _largest_sheets(diff: ConstitutionDiff) -> Iterator[Sheet]:
    for rank, place in enumerate(diff.largest, start=1):
        pair, one, other = diff.pairs[place], diff.a.labels[place], diff.b.labels[place]
        sides = (("first", pair.a, False), ("second", pair.b, True))
        rows = tuple((name, text, _p(one.p_a, turned), _p(other.p_a, turned)) for name, text, turned in sides)
        by = "; ".join(
            f"{name}: " + ", ".join(f"{key} {p:.2f}" for key, p in label.by_principle.items())
            for name, label in (("A", one), ("B", other))
        )
        title = f"{rank}. largest change: {conversation_text(pair.prompt)}"
        yield Sheet(title, ("completion", "text", "p under A", "p under B"), rows, (f"p(first) {by}",), labels=2)


def _p(p_a: float | None, turned: bool) -> str:
    return "undecided" if p_a is None else f"{1 - p_a if turned else p_a:.2f}"


def _share(share: float | None) -> str:
    return NONE if share is None else f"{share:.0%}"
