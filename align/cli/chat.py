"""`align chat MODEL`: answers questions that are typed in the terminal or piped in, one a line."""

import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer

from align.data.chat import prompt_ids
from align.errors import InputError
from align.models.loading import compute_dtype, default_device, load_causal_lm, load_tokenizer, stop_token_ids
from align.records import Conversation, Message
from align.run.progress import hide_loading_bars

NEW = "/new"
HELP = f"{NEW} starts a new conversation, Ctrl-C stops an answer, Ctrl-D ends the chat."
_COMMAND = re.compile(r"/[a-z]+(?=\s|$)", re.IGNORECASE)


class _Stream(TextStreamer):
    """Prints an answer while it is generated, and keeps it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        super().on_finalized_text(text, stream_end)


def chat(
    path: str,
    *,
    system_prompt: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.7,
    seed: int | None = None,
    precision: str = "auto",
) -> None:
    """Answer every line of standard input until it ends.

    Args:
        path: a model as a recipe names it, or the folder of a stage that trained one (`runs/…/ppo`).
        temperature: 0 decodes greedily.

    Raises:
        InputError: there is no such model, or it has no chat template; a setting is out of range; or the input is not
            UTF-8 text.
        KeyboardInterrupt: Ctrl-C was pressed and the input is piped. In a terminal, Ctrl-C stops the answer, or ends
            the chat at the prompt.
    """
    if not (0 <= temperature < math.inf and max_new_tokens > 0):
        raise InputError(
            f"align chat: --temperature must be 0 or more and --max-new-tokens above 0; got {temperature:g} and "
            f"{max_new_tokens}"
        )
    folder = model_folder(path)
    hide_loading_bars()
    tokenizer: Any = load_tokenizer(folder)
    model: Any = load_causal_lm(folder, compute_dtype(precision)).to(default_device())
    sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
    options = {
        "max_new_tokens": max_new_tokens,
        "eos_token_id": list(stop_token_ids(model, tokenizer)),
        "pad_token_id": tokenizer.pad_token_id,
        **(sampling if temperature else {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}),
    }
    if seed is not None:
        torch.manual_seed(seed)
    conversation: Conversation = ()
    for line in _lines():
        if line == NEW:
            conversation = ()
            continue
        asked = (*conversation, Message("user", line))
        ids = torch.tensor([prompt_ids(tokenizer, asked, system_prompt)], device=model.device)
        answer = _answer(model, ids, _Stream(tokenizer), options)
        conversation = (*asked, Message("assistant", answer)) if answer else conversation


def _answer(model: Any, ids: torch.Tensor, stream: _Stream, options: dict[str, Any]) -> str:
    """Print an answer and return it; in a terminal, Ctrl-C stops it and the part before is returned."""
    try:
        with torch.no_grad():
            model.generate(ids, attention_mask=torch.ones_like(ids), streamer=stream, **options)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        stream.end()
    return stream.text.strip()


def model_folder(path: str) -> str:
    """The folder of a model, given that folder or the folder of the stage that trained it; a hub id is unchanged.

    Raises:
        InputError: it is another folder, such as that of a run.
    """
    folder = Path(path)
    if (folder / "model" / "config.json").is_file():
        return str(folder / "model")
    if folder.is_dir() and not any(folder.glob("*.json")):
        found = sorted(str(config.parent.parent) for config in folder.glob("*/model/config.json"))
        raise InputError(f"{folder}: not a model; the models in it: {', '.join(found) or 'none'}")
    return path


def _lines() -> Iterator[str]:
    """The lines that are typed or piped in. Empty lines are skipped; commands other than `/new` print the help."""
    typed = sys.stdin.isatty()
    if typed:
        import readline  # noqa: F401 - the import gives `input` line editing

        print(HELP)
    while True:
        try:
            line = input("you: " if typed else "").strip()
            line.encode()
        except EOFError:
            return
        except KeyboardInterrupt:
            if not typed:
                raise
            print()
            return
        except UnicodeError:
            raise InputError("align chat: the input is not UTF-8 text; convert it to UTF-8") from None
        command = _COMMAND.match(line)
        if command and line != NEW:
            unknown = "" if command[0] == "/help" else f"{command[0]}: no such command. "
            print(f"{unknown}{HELP}", file=sys.stderr)
        elif line:
            yield line
