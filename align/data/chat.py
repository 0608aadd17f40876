"""Conversations as token ids, rendered with the tokenizer's own chat template.

A conversation's ids have three parts: the prompt (up to the start of the assistant's answer), the completion (the
answer and the token that ends the turn), and what the template writes after that (`closing_ids`; a newline in ChatML).
"""

import re
from datetime import date
from typing import Any, Protocol

from align.errors import InputError
from align.records import Conversation, Message, as_dicts

_DATE = re.compile(r"""\bstrftime_now\(\s*(["'])(.*?)\1\s*\)""")
"""How templates print today's date (Llama 3, gpt-oss)."""

_fixed_date: date | None = None
_PROBE = Message("user", "Question"), Message("assistant", "Answer")


class ChatTokenizer(Protocol):
    """What this module needs of a `transformers` tokenizer."""

    all_special_ids: list[int]
    added_tokens_decoder: dict[int, Any]

    def __call__(self, text: str, *, add_special_tokens: bool) -> Any: ...

    def apply_chat_template(self, conversation: list[dict[str, str]], **kwargs: Any) -> Any: ...


def fix_date(day: date | None) -> None:
    """Have every chat template of this process print this day as today's, so that a resumed run has the same prompts.

    With None, templates print the day of the call.
    """
    global _fixed_date
    _fixed_date = day


def printed_date(tokenizer: Any) -> str:
    """The fixed day, if the tokenizer's chat template prints today's date; else empty."""
    return _fixed_date.isoformat() if _fixed_date and _prints_date(tokenizer) else ""


def _prints_date(tokenizer: Any) -> bool:
    return _DATE.search(str(getattr(tokenizer, "chat_template", ""))) is not None


def _dated_template(tokenizer: Any) -> dict[str, str]:
    """The chat template with the fixed date in it, as an option; empty if there is nothing to fix."""
    day = _fixed_date
    if day is None or not _prints_date(tokenizer):
        return {}
    return {"chat_template": _DATE.sub(lambda found: repr(day.strftime(found[2])), tokenizer.chat_template)}


def with_system_prompt(conversation: Conversation, system_prompt: str | None) -> Conversation:
    """The conversation with the system prompt as its first message, unless it has one or the prompt is empty."""
    if not system_prompt or (conversation and conversation[0].role == "system"):
        return conversation
    return (Message("system", system_prompt), *conversation)


def prompt_ids(
    tokenizer: ChatTokenizer, conversation: Conversation, system_prompt: str | None = None, prefill: str = ""
) -> list[int]:
    """Ids of the conversation and of the start of the assistant's turn, including `prefill`.

    Raises:
        InputError: the template refuses the conversation, usually because of the order of its roles.
    """
    return token_ids(tokenizer, prompt_text(tokenizer, conversation, system_prompt, prefill))


def prompt_text(
    tokenizer: ChatTokenizer, conversation: Conversation, system_prompt: str | None = None, prefill: str = ""
) -> str:
    """The text whose ids `prompt_ids` returns."""
    return _render(tokenizer, with_system_prompt(conversation, system_prompt), add_generation_prompt=True) + prefill


def completion_ids(tokenizer: ChatTokenizer, text: str) -> list[int]:
    """Ids of the assistant's answer and of the token that ends its turn."""
    return token_ids(tokenizer, text) + list(end_of_turn_ids(tokenizer))


def conversation_ids(
    tokenizer: ChatTokenizer, prompt: Conversation, completion: str, system_prompt: str | None = None
) -> tuple[list[int], list[int]]:
    """(prompt ids, completion ids). Followed by `closing_ids` they are what the template renders.

    Raises:
        InputError: the template renders the prompt differently once the answer follows, so that a model would be
            trained on other prompts than those it is given in generation.
    """
    messages = with_system_prompt(prompt, system_prompt)
    opening = _render(tokenizer, messages, add_generation_prompt=True)
    whole = _render(tokenizer, (*messages, Message("assistant", completion)))
    if not whole.startswith(opening):
        raise InputError(
            "chat template: the conversation with the answer does not start with the prompt alone "
            f"({_first_difference(opening, whole)}); use a template whose generation prompt is what it writes "
            "before an assistant's message"
        )
    answer = whole[len(opening) :].removesuffix(_turn_ending(tokenizer))
    return token_ids(tokenizer, opening), completion_ids(tokenizer, answer)


def whole_ids(
    tokenizer: ChatTokenizer,
    prompt: Conversation,
    completion: str,
    system_prompt: str | None = None,
    *,
    finished: bool = True,
) -> list[int]:
    """Ids of the whole conversation as the template writes it, what follows the end of the turn included.

    Args:
        finished: whether the completion ended its turn; if not, what the template writes after it is left out.

    Raises:
        InputError: the template refuses the conversation, or writes something unexpected after the completion.
    """
    whole = _render(tokenizer, (*with_system_prompt(prompt, system_prompt), Message("assistant", completion)))
    if finished:
        return token_ids(tokenizer, whole)
    ending = _turn_ending(tokenizer)
    if not whole.endswith(ending):
        raise InputError(f"chat template: does not end the conversation with {ending!r}, which ends another")
    return token_ids(tokenizer, whole.removesuffix(ending))


def same_tokens(one: Any, other: Any) -> bool:
    """Whether two tokenizers have the same ids and chat template, so that a model of one reads the other's ids."""
    return one.chat_template == other.chat_template and one.get_vocab() == other.get_vocab()


def end_of_turn_ids(tokenizer: ChatTokenizer) -> tuple[int, ...]:
    """What the template writes after the assistant's answer, up to and including the token that ends the turn.

    Raises:
        InputError: no special token ends the turn, so a model could not learn to stop.
    """
    ids = token_ids(tokenizer, _turn_ending(tokenizer))
    return tuple(ids[: _stop_position(tokenizer, ids) + 1])


def special_ids(tokenizer: ChatTokenizer) -> set[int]:
    """The special tokens: those that the tokenizer names, and those that are special in its file alone.

    Gemma and Phi end turns with a token of the second kind.
    """
    unnamed = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return unnamed.union(tokenizer.all_special_ids)


def closing_ids(tokenizer: ChatTokenizer) -> tuple[int, ...]:
    """What the template writes after the token that ends the assistant's turn."""
    ids = token_ids(tokenizer, _turn_ending(tokenizer))
    return tuple(ids[_stop_position(tokenizer, ids) + 1 :])


def _stop_position(tokenizer: ChatTokenizer, ids: list[int]) -> int:
    special = special_ids(tokenizer)
    for position, token in enumerate(ids):
        if token in special:
            return position
    raise InputError(
        "chat template: no special token ends the assistant's turn, so a model trained on it could not learn to stop; "
        "use a template that writes the tokenizer's eos_token after an assistant's message"
    )


def _turn_ending(tokenizer: ChatTokenizer) -> str:
    whole = _render(tokenizer, _PROBE)
    words = _PROBE[-1].content
    if words not in whole:
        raise InputError("chat template: leaves out the assistant's message; use a template that writes it")
    return whole[whole.rindex(words) + len(words) :]


def _render(tokenizer: ChatTokenizer, conversation: Conversation, *, add_generation_prompt: bool = False) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            as_dicts(conversation),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **_dated_template(tokenizer),
        )
    except TemplateError as error:
        roles = ", ".join(message.role for message in conversation)
        raise InputError(f"chat template: refuses a conversation with the roles {roles} ({error})") from None


def token_ids(tokenizer: ChatTokenizer, text: str) -> list[int]:
    """Ids of a text, without special tokens added: the chat template has written them already."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def _first_difference(first: str, second: str) -> str:
    position = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), len(second))
    return f"at character {position}: {first[position : position + 20]!r} against {second[position : position + 20]!r}"
