"""`align chat MODEL`: answers questions that are typed in the terminal or piped in, one a line."""

import math
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer

from align.data.answers import AnswerReader
from align.data.chat import prompt_ids
from align.errors import InputError
from align.models.loading import compute_dtype, default_device, load_causal_lm, load_tokenizer, stop_token_ids
from align.records import Conversation, Message
from align.run.progress import hide_loading_bars

NEW = "/new"
HELP = f"{NEW} starts a new conversation, Ctrl-C stops an answer, Ctrl-D ends the chat."
NO_ANSWER = "No answer followed this thought, so it is not part of the conversation; --max-new-tokens sets the limit."
_COMMAND = re.compile(r"/[a-z]+(?=\s|$)", re.IGNORECASE)


class _Stream(TextStreamer):
    """Prints a completion while it is generated, and keeps its tokens without the stop token.

    The completions of models that think are printed with their special tokens, which mark where the answer begins.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, reader: AnswerReader, stop_ids: Sequence[int]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=not reader.thinks)
        self.tokens: list[int] = []
        self._stop_ids = stop_ids

    def put(self, value: torch.Tensor) -> None:
        written = [] if self.next_tokens_are_prompt else value.flatten().tolist()
        if not set(written) & set(self._stop_ids):
            self.tokens += written
            super().put(value)


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
    _check_options(temperature, max_new_tokens)
    folder = model_folder(path)
    hide_loading_bars()
    tokenizer: Any = load_tokenizer(folder)
    model: Any = load_causal_lm(folder, compute_dtype(precision)).to(default_device())
    sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
    stop_ids = list(stop_token_ids(model, tokenizer))
    options = {
        "max_new_tokens": max_new_tokens,
        "eos_token_id": stop_ids,
        "pad_token_id": tokenizer.pad_token_id,
        **(sampling if temperature else {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}),
    }
    if seed is not None:
        torch.manual_seed(seed)
    reader = AnswerReader(tokenizer)
    conversation: Conversation = ()
    for line in _lines():
        if line == NEW:
            conversation = ()
            continue
        asked = (*conversation, Message("user", line))
        opening = prompt_ids(tokenizer, asked, system_prompt)
        written = _written(model, opening, _Stream(tokenizer, reader, stop_ids), options)
        answer = reader.read(opening, written)
        if not answer.given:
            print(NO_ANSWER, file=sys.stderr)
        conversation = (*asked, Message("assistant", words)) if (words := answer.text.strip()) else conversation


def _check_options(temperature: float, max_new_tokens: int) -> None:
    if not (0 <= temperature < math.inf and max_new_tokens > 0):
        raise InputError(
            f"align chat: --temperature must be 0 or more and --max-new-tokens above 0; got {temperature:g} and "
            f"{max_new_tokens}"
        )


def _written(model: Any, opening: Sequence[int], stream: _Stream, options: dict[str, Any]) -> list[int]:
    """Print a completion and return its tokens; in a terminal, Ctrl-C stops it and the part before is returned."""
    ids = torch.tensor([opening], device=model.device)
    try:
        with torch.no_grad():
            model.generate(ids, attention_mask=torch.ones_like(ids), streamer=stream, **options)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        stream.end()
    return stream.tokens


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
