"""The verbs `align constitution check`, `show`, `schema`, `diff` and `stats`."""

import argparse
from pathlib import Path

from align.cli.options import Verbs, add_group, add_verb, positive
from align.pipeline.recipe import load_recipe


def add_constitution_verbs(verbs: Verbs) -> None:
    """Add `align constitution` and its verbs."""
    group = add_group(verbs, "constitution", "check|show|schema|diff|stats", "check, show and compare constitutions")
    check = add_verb(group, "check", _check, "check constitution files, and report every error in them")
    check.add_argument("files", metavar="FILE", nargs="+", help="constitution files")
    show = add_verb(group, "show", _show, "print a constitution in full, with everything it inherits through `extends`")
    show.add_argument("file", metavar="FILE", help="a constitution file")
    add_verb(group, "schema", _schema, "print the JSON schema, with which an editor completes and checks the files")
    _add_diff(group)
    _add_stats(group)


def _add_diff(group: Verbs) -> None:
    text = "compare two constitutions: their texts, and the labels that a judge gives the same pairs under each"
    diff = add_verb(group, "diff", _diff, text)
    diff.add_argument("a", metavar="A", type=Path, help="a constitution file")
    diff.add_argument("b", metavar="B", type=Path, help="the constitution file to compare it with")
    pairs = diff.add_mutually_exclusive_group()
    pairs.add_argument("--pairs", metavar="FILE|RUN", type=Path, help="pairs to judge (default: the probes of A and B)")
    pairs.add_argument("--recipe", metavar="RECIPE", help="judge the pairs of this recipe's run")
    diff.add_argument("--judge", choices=("rule", "contrast", "choice"), help="(default: the run's judge, else rule)")
    diff.add_argument("--judge-model", metavar="MODEL", help="its model (without --judge, a contrast judge)")
    diff.add_argument("--draw", action="store_true", help="judge by one drawn principle a pair, and A with two seeds")
    diff.add_argument("--null", metavar="FILE", type=Path, help="a paraphrase of A (default: A-paraphrased.yaml)")
    diff.add_argument(
        "--placebo", metavar="FILE", type=Path, help="constitution unrelated to the pairs (default: placebo.yaml)"
    )
    diff.add_argument("--limit", metavar="N", type=positive, default=300, help="pairs to judge at most (default: 300)")
    diff.add_argument("--html", metavar="FILE", type=Path, help="also write the comparison as an HTML page")
    diff.add_argument("--json", metavar="FILE", type=Path, help="also write the comparison as JSON")


def _add_stats(group: Verbs) -> None:
    text = "show for each principle of a run how often it was drawn, found faults, won, and agreed with the others"
    stats = add_verb(group, "stats", _stats, text)
    stats.add_argument("run_folder", metavar="RUN", type=Path, help="a run's folder, such as runs/RECIPE/RUN")
    stats.add_argument("--constitution", metavar="FILE", type=Path, help="the run's own (default: the copy it keeps)")
    stats.add_argument("--human", metavar="FILE", type=Path, help="human preferences, for the run's judge to label")
    stats.add_argument("--limit", metavar="N", type=positive, default=300, help="--human pairs at most (default: 300)")


def _check(options: argparse.Namespace) -> None:
    from align.cli.constitution_show import check_constitutions

    check_constitutions(options.files)


def _show(options: argparse.Namespace) -> None:
    from align.cli.constitution_show import show_constitution

    show_constitution(options.file)


def _schema(_: argparse.Namespace) -> None:
    from align.cli.constitution_schema import schema_page

    print(schema_page(), end="")


def _diff(options: argparse.Namespace) -> None:
    from align.cli.constitution_diff import print_diff

    print_diff(
        options.a,
        options.b,
        pairs=load_recipe(options.recipe).directory("compare") if options.recipe else options.pairs,
        kind=options.judge,
        model=options.judge_model,
        draws_principle=options.draw,
        null=options.null,
        placebo=options.placebo,
        limit=options.limit,
        html=options.html,
        json=options.json,
    )


def _stats(options: argparse.Namespace) -> None:
    from align.cli.constitution_stats import print_stats

    print_stats(options.run_folder, constitution=options.constitution, human=options.human, limit=options.limit)
