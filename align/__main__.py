"""The command line: `align VERB …`, or `python -m align VERB …`.

This module parses the arguments, reports errors and ends the process. It imports no heavy library; a verb does so once
it needs one.
"""

import argparse
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence

from align.cli.constitution_verbs import add_constitution_verbs
from align.cli.data_verbs import add_data_verbs
from align.cli.judging_verbs import add_judging_verbs
from align.cli.recipe_verbs import add_recipe_verbs
from align.cli.results_verbs import add_results_verbs
from align.errors import AlignError, InputError
from align.pipeline.failure_note import another_failed_first, note_failure
from align.pipeline.launch import GRACE_SECONDS, INTERRUPTED, die_with_launcher
from align.run import processes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code: 0 success, 1 an internal failure, 2 invalid input, 130 interrupted."""
    try:
        options = _parser().parse_args(arguments)
        return int(options.run(options) or 0)
    except AlignError as error:
        if os.environ.get("ALIGN_DEBUG"):
            traceback.print_exc()
        return _report_error(error)
    except KeyboardInterrupt:
        interruption = AlignError("interrupted; run the same command again to resume")
        interruption.exit_code = INTERRUPTED
        return _report_error(interruption)


def _report_error(error: AlignError) -> int:
    """Print an error, unless another process reports it; returns its exit code."""
    if not note_failure(error):
        rank = f"process {processes.rank()}: " if _is_one_of_several() else ""
        print(f"{rank}{error}", file=sys.stderr)
    return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="align",
        description="Train a language model with RLHF or Constitutional AI. A recipe, one YAML file, describes every "
        "stage, from sampling and feedback to training and evaluation.",
        epilog="To start: `align run recipes/quickstart.yaml`. For the options of a verb: `align VERB --help`.",
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    add_recipe_verbs(verbs)
    add_constitution_verbs(verbs)
    add_data_verbs(verbs)
    add_judging_verbs(verbs)
    add_results_verbs(verbs)
    return parser


def _is_one_of_several() -> bool:
    """Whether this process is one of several of a run; False if the environment is invalid, which is reported later."""
    try:
        return processes.world_size() > 1
    except InputError:
        return False


def _silence_output() -> int:
    """Send further output nowhere, since its reader (such as `head`) has closed the pipe; returns the exit code that
    shells report for this."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE


def end() -> None:
    """Run the command line and end this process with its exit code.

    If it is one of several processes and has failed, it exits without cleaning up, which would wait for the others.
    """
    die_with_launcher()
    if not sys.stderr.isatty():
        # This hides the progress bars that libraries show while loading and saving, not those of the stages.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        code = main()
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        code = _silence_output()
    except SystemExit as ended:
        # Rich's console turns a broken pipe into a SystemExit.
        if not isinstance(ended.__context__, BrokenPipeError):
            raise
        code = _silence_output()
    except Exception:
        if not note_failure(AlignError(traceback.format_exc().rstrip())):
            raise
        code = 1
        sys.stdout.flush()
        sys.stderr.flush()
    if _is_one_of_several():
        if code:
            if another_failed_first():
                # The launcher ends this process during the wait, and then counts only the first failure.
                time.sleep(GRACE_SECONDS)
            os._exit(code)
        processes.disconnect()
    sys.exit(code)


if __name__ == "__main__":
    end()
