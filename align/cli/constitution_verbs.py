"""`align constitution check`, `show`, `schema`, `diff` and `stats`."""

import argparse
from pathlib import Path

from align.cli.options import Verbs, positive
from align.pipeline.recipe import load_recipe


def add_constitution(verbs: Verbs) -> None:
    """Add `align constitution` and its kinds."""
    constitution = verbs.add_parser("constitution", help="check, show or compare constitutions")
    kinds = constitution.add_subparsers(metavar="check|show|schema|diff|stats", required=True)
    check = kinds.add_parser("check", help="say what files hold, or every fault of theirs")
    check.add_argument("files", metavar="FILE", nargs="+")
    check.set_defaults(run=_check_constitutions)
    show = kinds.add_parser("show", help="print a constitution as it stands after `extends`")
    show.add_argument("file", metavar="FILE")
    show.set_defaults(run=_show_constitution)
    schema = kinds.add_parser("schema", help="print the JSON schema, with which editors complete and check the files")
    schema.set_defaults(run=_constitution_schema)
    _add_constitution_diff(kinds)


def _add_constitution_diff(kinds: Verbs) -> None:
    text = "what differs between two constitutions: their texts, and the labels a judge gives the same pairs"
    diff = kinds.add_parser("diff", help=text, description=text)
    diff.add_argument("a", metavar="A", type=Path)
    diff.add_argument("b", metavar="B", type=Path)
    pairs = diff.add_mutually_exclusive_group()
    pairs.add_argument("--pairs", metavar="FILE|RUN", type=Path, help="preferences, or a run whose compare is done")
    pairs.add_argument("--recipe", metavar="RECIPE", help="the pairs of this recipe's run under its constitution")
    diff.add_argument("--judge", choices=("rule", "contrast", "choice"), help="(default: the run's own; else rule)")
    diff.add_argument("--judge-model", metavar="MODEL", help="the model that judges; by contrast unless said otherwise")
    diff.add_argument("--draw", action="store_true", help="draw one principle a pair, A with two seeds")
    diff.add_argument("--null", metavar="FILE", type=Path, help="A in other words (default: A-paraphrased.yaml)")
    diff.add_argument("--placebo", metavar="FILE", type=Path, help="(default: placebo.yaml beside A, or the shipped)")
    diff.add_argument("--limit", metavar="N", type=positive, default=300, help="pairs judged (default: 300)")
    diff.add_argument("--html", metavar="FILE", type=Path, help="write the difference as a page too")
    diff.add_argument("--json", metavar="FILE", type=Path, help="and as JSON")
    diff.set_defaults(run=_diff_constitutions)

    text = "by principle: draws, faults found, revisions accepted, wins, agreement with the rest and with people"
    stats = kinds.add_parser("stats", help=text, description=text)
    stats.add_argument("run_folder", metavar="RUN", type=Path)
    stats.add_argument("--constitution", metavar="FILE", type=Path, help="the run's own (default: the copy it keeps)")
    stats.add_argument("--human", metavar="FILE", type=Path, help="preferences of people, judged by the run's judge")
    stats.add_argument("--limit", metavar="N", type=positive, default=300, help="pairs of them (default: 300)")
    stats.set_defaults(run=_constitution_stats)


def _check_constitutions(options: argparse.Namespace) -> None:
    from rich.console import Console

    from align.cli.constitution_show import check_constitutions

    check_constitutions(options.files, Console())


def _show_constitution(options: argparse.Namespace) -> None:
    from rich.console import Console

    from align.cli.constitution_show import show_constitution

    show_constitution(options.file, Console())


def _constitution_schema(options: argparse.Namespace) -> None:
    from align.cli.constitution_schema import schema_page

    print(schema_page(), end="")


def _diff_constitutions(options: argparse.Namespace) -> None:
    from align.cli.constitution_diff import main as diff

    pairs = load_recipe(options.recipe).directory("compare") if options.recipe else options.pairs
    diff(
        options.a,
        options.b,
        pairs=pairs,
        kind=options.judge,
        model=options.judge_model,
        draws=options.draw,
        null=options.null,
        placebo=options.placebo,
        limit=options.limit,
        html=options.html,
        json=options.json,
    )


def _constitution_stats(options: argparse.Namespace) -> None:
    from align.cli.constitution_stats import main as stats

    stats(options.run_folder, constitution=options.constitution, human=options.human, limit=options.limit)
