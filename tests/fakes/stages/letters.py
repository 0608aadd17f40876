"""A stage without inputs that writes the text of its settings, or fails as its settings say."""

import errno
import os
from pathlib import Path
from typing import Any, Literal

from align.errors import InputError, NotFinite
from align.run import processes
from align.run.stage import Context, Outcome, Stage
from align.settings.blocks import Block


class LettersBlock(Block):
    text: str = "abc"
    source: str | None = None
    fail: Literal["", "input", "not_finite", "full", "library_full", "torch_full", "refused", "once"] = ""
    fail_in: int = 0


class Letters(Stage):
    name = "letters"
    help = "write letters"
    settings = LettersBlock
    outputs = ("letters.txt", "folder", "sometimes")

    def inputs(self, settings: LettersBlock) -> tuple[str, ...]:
        return ()

    def files(self, settings: LettersBlock) -> tuple[str, ...]:
        return (settings.source,) if settings.source else ()

    def run(self, context: Context) -> Outcome:
        journal = context.output / f"letters.journal.{processes.rank()}"
        resumed = journal.exists()
        journal.write_text("begun")
        if processes.rank() == context.settings.fail_in:
            _fail(context.settings.fail, resumed)
        processes.barrier()
        if processes.is_first():
            (context.output / "folder" / "inner").mkdir(parents=True, exist_ok=True)
            (context.output / "folder" / "inner" / "file").write_text("inside")
            (context.output / "letters.txt").write_text(context.settings.text + _read(context.settings.source))
        return Outcome({"letters": len(context.settings.text)}, {"resumed": resumed, "pid": os.getpid() > 0})


def _read(source: str | None) -> str:
    return Path(source).read_text() if source else ""


def _fail(how: str, resumed: bool) -> None:
    failures: dict[str, Any] = {
        "input": InputError("letters.txt, line 3: not a letter; mend it"),
        "not_finite": NotFinite("letters: loss is NaN at step 3"),
        "full": OSError(errno.ENOSPC, "No space left on device"),
        "library_full": RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    }
    if how in failures:
        raise failures[how]
    if how == "torch_full":
        _save_onto_a_full_disk()
    if how == "refused":
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/weights")
    if how == "once" and not resumed:
        raise KeyboardInterrupt


def _save_onto_a_full_disk() -> None:
    import torch

    torch.save({"weights": torch.zeros(1 << 20)}, "/dev/full")


STAGE = Letters()
