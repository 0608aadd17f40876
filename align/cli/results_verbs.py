"""The verbs `align chat`, `compare-runs`, `export` and `overoptimisation`, which work on finished runs."""

import argparse
from pathlib import Path

from align.cli.options import Verbs, add_verb
from align.pipeline.launch import INTERRUPTED


def add_results_verbs(verbs: Verbs) -> None:
    """Add the verbs, in the order in which the help lists them."""
    chat = add_verb(verbs, "chat", _chat, "talk to a model in the terminal")
    chat.add_argument("model", metavar="MODEL", help="a model, or the folder of a stage that trained one")
    chat.add_argument("--system", metavar="TEXT", help="system prompt")
    chat.add_argument("--max-new-tokens", metavar="N", type=int, default=512, help="length of an answer (default: 512)")
    chat.add_argument("--temperature", metavar="T", type=float, default=0.7, help="0 is greedy decoding (default: 0.7)")
    chat.add_argument("--seed", metavar="N", type=int, help="the same seed gives the same answers")
    _add_compare_runs(verbs)
    _add_export(verbs)
    _add_overoptimisation(verbs)


def _add_compare_runs(verbs: Verbs) -> None:
    text = "show completions and figures of two evaluated runs side by side"
    compare = add_verb(verbs, "compare-runs", _compare_runs, text)
    compare.add_argument("run_a", metavar="RUN_A", type=Path, help="a run's folder, such as runs/RECIPE/RUN")
    compare.add_argument("run_b", metavar="RUN_B", type=Path, help="the run to compare it with")
    compare.add_argument("--limit", metavar="N", type=int, default=5, help="prompts to show (default: 5)")
    compare.add_argument("--null", metavar="RUN", type=Path, help="a control that should not differ from RUN_A")
    compare.add_argument("--html", metavar="FILE", type=Path, help="also write the comparison as an HTML page")


def _add_export(verbs: Verbs) -> None:
    text = "write a run's rows as a data set for the hub: parquet in TRL's formats, and a card of how it was made"
    export = add_verb(verbs, "export", _export, text)
    export.add_argument("run_folder", metavar="RUN", type=Path, help="a run's folder, such as runs/RECIPE/RUN")
    export.add_argument("--output", metavar="FOLDER", type=Path, required=True, help="a new or empty folder")
    choices = ("preferences", "sft", "revisions")
    export.add_argument("--what", nargs="+", choices=choices, default=[], help="(default: all that the run has)")
    export.add_argument("--constitution", metavar="FILE", type=Path, help="the run's own, if the run keeps no copy")
    export.add_argument("--overwrite", action="store_true", help="replace an earlier export in the folder")


def _add_overoptimisation(verbs: Verbs) -> None:
    text = "show how proxy and gold reward change with the KL divergence from the SFT policy"
    study = add_verb(verbs, "overoptimisation", _overoptimisation, text)
    study.add_argument("target", metavar="RUN", type=Path, help="a run's folder, such as runs/RECIPE/RUN")
    study.add_argument("--gold", metavar="NAME", help="the gold reward, if the recipe has several")
    plots = study.add_mutually_exclusive_group()
    plots.add_argument("--plot", metavar="FILE", type=Path, help="the plot (default: RUN/overoptimisation.svg)")
    plots.add_argument("--no-plot", action="store_true", help="write no plot, which needs matplotlib")


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
        # A chat cannot be resumed, so the message that other verbs print would be wrong.
        return INTERRUPTED
    return 0


def _compare_runs(options: argparse.Namespace) -> None:
    from align.cli.compare_runs import print_comparison

    print_comparison(options.run_a, options.run_b, limit=options.limit, html=options.html, null=options.null)


def _export(options: argparse.Namespace) -> None:
    from align.cli.export import export_run

    export_run(
        options.run_folder,
        options.output,
        what=options.what,
        constitution=options.constitution,
        overwrite=options.overwrite,
    )


def _overoptimisation(options: argparse.Namespace) -> None:
    from align.cli.overoptimisation import print_study

    print_study(options.target, gold=options.gold, plot=options.plot, with_plot=not options.no_plot)
