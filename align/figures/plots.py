"""What every picture shares: its style, what to install where matplotlib is missing, and how it is written."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from align.errors import InputError

# Text stays text, so the file is small; ids come from a fixed salt, so the same figures give the same bytes.
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "align", "font.size": 9}


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def require_matplotlib(without: str) -> None:
    """Say what to install where matplotlib is missing.

    Args:
        without: the option that leaves the picture out.

    Raises:
        InputError: it is.
    """
    if not can_plot():
        raise InputError(
            "the plot needs matplotlib, which the extra `plots` brings: pip install 'align-rlhf[plots]'; "
            f"or leave {without}"
        )


def save_figure(figure: Any, path: Path) -> None:
    """Write a picture, in the format that the path's suffix names.

    Raises:
        InputError: matplotlib knows no such format, or the file cannot be written.
    """
    try:
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be written ({error}); choose another place with --plot") from None
