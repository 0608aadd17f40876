"""What all plots share: the style, the check that matplotlib is installed, and the writing of files."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from align.errors import InputError

# Text stays text, so that files are small. The fixed salt for ids makes the same figures give the same bytes.
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "align", "font.size": 9}


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def require_matplotlib(without: str) -> None:
    """Raise an error that says what to install if matplotlib is missing.

    Args:
        without: the option that leaves the plot out.

    Raises:
        InputError: matplotlib is not installed.
    """
    if not can_plot():
        raise InputError(
            "the plot needs matplotlib; install it with the extra `plots`: pip install 'align-rlhf[plots]'; "
            f"or leave {without}"
        )


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure to a file, in the format of its suffix.

    Raises:
        InputError: matplotlib does not know the format, or the file cannot be written.
    """
    try:
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be written ({error}); choose another place with --plot") from None
