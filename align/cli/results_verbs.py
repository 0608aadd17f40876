"""`align chat`, `compare-runs`, `export` and `overoptimisation`: what is done with finished runs."""

import argparse
from pathlib import Path

from align.cli.options import Verbs
from align.pipeline.launch import INTERRUPTED


def add_results(verbs: Verbs) -> None:
    """Add what looks at finished runs, or gives them away."""
    chat = verbs.add_parser("chat", help="talk to a model")
    chat.add_argument("model", metavar="MODEL", help="a model, or the folder of a stage that made one")
    chat.add_argument("--system", metavar="TEXT", help="system prompt")
    chat.add_argument("--max-new-tokens", type=int, default=512)
    chat.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest token (default: 0.7)")
    chat.add_argument("--seed", type=int)
    chat.set_defaults(run=_chat)

    compare = verbs.add_parser("compare-runs", help="completions and figures of two evaluated runs, side by side")
    compare.add_argument("run_a", metavar="RUN_A", type=Path)
    compare.add_argument("run_b", metavar="RUN_B", type=Path)
    compare.add_argument("--limit", type=int, default=5, help="prompts whose completions are shown (default: 5)")
    compare.add_argument("--null", metavar="RUN", type=Path, help="a run that should not differ from RUN_A")
    compare.add_argument("--html", metavar="FILE", type=Path, help="write the comparison as a page too")
    compare.set_defaults(run=_compare_runs)

    _add_export(verbs)
    text = "proxy and gold reward of a finished run by the distance from its SFT policy"
    study = verbs.add_parser("overoptimisation", help=text, description=text)
    study.add_argument("target", metavar="RUN", type=Path)
    study.add_argument("--gold", metavar="NAME", help="the gold source, where the recipe has several")
    plots = study.add_mutually_exclusive_group()
    plots.add_argument("--plot", metavar="FILE", type=Path, help="where it goes (default: RUN/overoptimisation.svg)")
    plots.add_argument("--no-plot", action="store_true", help="table and JSON alone, which need no matplotlib")
    study.set_defaults(run=_overoptimisation)


def _add_export(verbs: Verbs) -> None:
    text = "a run's rows as a data set for the hub: parquet in TRL's formats, and a card that says how it was made"
    export = verbs.add_parser("export", help=text, description=text)
    export.add_argument("run_folder", metavar="RUN", type=Path, help="such as runs/RECIPE/RUN")
    export.add_argument("--output", metavar="FOLDER", type=Path, required=True, help="a new or empty folder")
    choices = ("preferences", "sft", "revisions")
    export.add_argument("--what", nargs="+", choices=choices, default=[], help="(default: all that the run has)")
    export.add_argument("--constitution", metavar="FILE", type=Path, help="the run's, where it keeps no copy")
    export.add_argument("--overwrite", action="store_true", help="replace an earlier export in the folder")
    export.set_defaults(run=_export)


def _chat(options: argparse.Namespace) -> int:
    try:
        from align.cli.chat import chat

        chat(
            options.model,
            system_prompt=options.system,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            seed=options.seed,
        )
    except KeyboardInterrupt:
        # There is nothing that the same command would go on with.
        return INTERRUPTED
    return 0


def _compare_runs(options: argparse.Namespace) -> None:
    from align.cli.compare_runs import main as compare

    compare(options.run_a, options.run_b, limit=options.limit, html=options.html, null=options.null)


def _overoptimisation(options: argparse.Namespace) -> None:
    from align.cli.overoptimisation import main as study

    study(options.target, gold=options.gold, plot=options.plot, with_plot=not options.no_plot)


def _export(options: argparse.Namespace) -> None:
    from align.cli.export import main as export

    export(
        options.run_folder,
        options.output,
        what=options.what,
        constitution=options.constitution,
        overwrite=options.overwrite,
    )
