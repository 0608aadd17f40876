"""Prompts that a model cannot read are left out or cut as the recipe says, and nothing else is."""

import copy
from typing import Any

import pytest

from align.data.prompt_fit import PromptFit
from align.data.prompts import TOO_LONG
from align.errors import InputError
from align.records import Conversation, Message

WORDS = " ".join(f"w{number}" for number in range(60))
TALK = (
    Message("system", "Be brief."),
    Message("user", "First."),
    Message("assistant", "Yes."),
    Message("user", WORDS),
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tests.tiny import build_tokenizer

    return build_tokenizer()


def length(tokenizer: Any, conversation: Conversation | str) -> int:
    assert not isinstance(conversation, str)
    dicts = [message.as_dict() for message in conversation]
    text = tokenizer.apply_chat_template(dicts, tokenize=False, add_generation_prompt=True)
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_a_prompt_at_the_limit_is_kept_and_a_longer_one_left_out(tokenizer: Any) -> None:
    whole = length(tokenizer, TALK)

    assert PromptFit(tokenizer, max_tokens=whole)(TALK) == TALK
    assert PromptFit(tokenizer, max_tokens=whole - 1)(TALK) == TOO_LONG
    assert PromptFit(tokenizer)(TALK) == TALK


def test_the_system_prompt_counts(tokenizer: Any) -> None:
    conversation = (Message("user", "Hi"),)
    limit = length(tokenizer, (Message("system", "Be brief."), *conversation))

    assert PromptFit(tokenizer, "Be brief.", limit)(conversation) == conversation
    assert PromptFit(tokenizer, "Be brief.", limit - 1)(conversation) == TOO_LONG


def test_a_cut_at_the_start_drops_first_turns_and_keeps_the_end_of_the_text(tokenizer: Any) -> None:
    limit = length(tokenizer, TALK) - 30
    cut = PromptFit(tokenizer, max_tokens=limit, cut="start")(TALK)

    assert not isinstance(cut, str) and length(tokenizer, cut) <= limit
    assert cut[0] == TALK[0] and len(cut) == 2
    assert WORDS.endswith(cut[1].content) and cut[1].content


def test_a_cut_at_the_start_drops_no_more_turns_than_it_must(tokenizer: Any) -> None:
    without_first = (TALK[0], TALK[3])
    cut = PromptFit(tokenizer, max_tokens=length(tokenizer, without_first), cut="start")(TALK)

    assert cut == without_first


def test_a_cut_at_the_end_keeps_all_turns_and_the_start_of_the_text(tokenizer: Any) -> None:
    limit = length(tokenizer, TALK) - 30
    cut = PromptFit(tokenizer, max_tokens=limit, cut="end")(TALK)

    assert not isinstance(cut, str) and length(tokenizer, cut) <= limit
    assert cut[:3] == TALK[:3] and WORDS.startswith(cut[3].content) and cut[3].content


def test_a_prompt_of_which_nothing_would_remain_is_left_out(tokenizer: Any) -> None:
    assert PromptFit(tokenizer, max_tokens=5, cut="end")(TALK) == TOO_LONG


@pytest.mark.parametrize("role", ["tool", "system"])
def test_a_template_that_leaves_out_a_message_is_noticed(tokenizer: Any, role: str) -> None:
    silent = copy.deepcopy(tokenizer)
    silent.chat_template = (
        "{% for message in messages %}{% if message.role in ('user', 'assistant') %}"
        "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
    )
    conversation = (Message("user", "a"), Message("assistant", "b"), Message(role, "lost"), Message("user", "c"))

    with pytest.raises(InputError, match=f"leaves out the message of role {role}"):
        PromptFit(silent)(conversation)
    assert PromptFit(tokenizer)(conversation) == conversation
