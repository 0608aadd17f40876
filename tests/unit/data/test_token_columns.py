"""Token columns equal what generation produces: prompt, completion, and the token that ends the turn."""

from typing import Any

import pytest

from align.data.token_columns import IGNORE_INDEX, demonstration_columns, pair_columns, whole_conversations
from align.records import Demonstration, Message, PreferencePair, as_dicts

PROMPT = (Message("user", "Where is the cat?"),)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tests.tiny import build_tokenizer

    return build_tokenizer()


def demonstration(completion: str, name: str = "d") -> Demonstration:
    return Demonstration(name, PROMPT, completion, "own")


def pair(chosen: str, rejected: str, probability: float = 0.75, name: str = "p") -> PreferencePair:
    return PreferencePair(
        name, PROMPT, (Message("assistant", chosen),), (Message("assistant", rejected),), probability, "ai"
    )


def test_only_the_completion_and_its_end_of_turn_are_labelled(tokenizer: Any) -> None:
    columns = demonstration_columns(tokenizer, [demonstration("On the mat.")], 100)
    (row,) = columns.rows
    prompt = tokenizer.apply_chat_template(as_dicts(PROMPT), add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(row["input_ids"]) == prompt + "On the mat.<|im_end|>"
    length = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    assert row["labels"] == [IGNORE_INDEX] * length + row["input_ids"][length:]
    assert row["labels"][-1] == tokenizer.eos_token_id
    assert row["length"] == len(row["input_ids"])
    assert columns.too_long == ()


def test_the_system_prompt_comes_first_unless_the_conversation_has_one(tokenizer: Any) -> None:
    own = (Message("system", "Purr."), *PROMPT)
    rows = [demonstration("Yes."), Demonstration("s", own, "Yes.", "own")]
    without, with_own = demonstration_columns(tokenizer, rows, 200, "Be a cat.").rows
    assert tokenizer.decode(without["input_ids"]).startswith("<|im_start|>system\nBe a cat.<|im_end|>")
    assert tokenizer.decode(with_own["input_ids"]).startswith("<|im_start|>system\nPurr.<|im_end|>")


def test_a_row_at_the_limit_is_kept_and_a_longer_one_is_reported(tokenizer: Any) -> None:
    rows = [demonstration("Yes.", "short"), demonstration("Yes. " * 30, "long")]
    (length,) = {len(row["input_ids"]) for row in demonstration_columns(tokenizer, rows[:1], 1000).rows}
    at_limit = demonstration_columns(tokenizer, rows, length)
    assert (len(at_limit), at_limit.too_long) == (1, ("long",))
    below = demonstration_columns(tokenizer, rows, length - 1)
    assert (len(below), below.too_long) == (0, ("short", "long"))


def test_pairs_share_the_prompt_and_keep_their_soft_label(tokenizer: Any) -> None:
    (row,) = pair_columns(tokenizer, [pair("On the mat.", "No.")], 100).rows
    assert tokenizer.decode(row["chosen_ids"]) == "On the mat.<|im_end|>"
    assert tokenizer.decode(row["rejected_ids"]) == "No.<|im_end|>"
    assert row["probability"] == 0.75
    (whole,) = whole_conversations(pair_columns(tokenizer, [pair("On the mat.", "No.")], 100)).rows
    assert whole["chosen_ids"] == row["prompt_ids"] + row["chosen_ids"]
    assert whole["rejected_ids"] == row["prompt_ids"] + row["rejected_ids"]
    assert whole["probability"] == 0.75
    assert whole["length"] == row["length"] == max(len(whole["chosen_ids"]), len(whole["rejected_ids"]))


@pytest.mark.parametrize(("chosen", "rejected"), [("Yes. " * 50, "No."), ("Yes.", "No. " * 50)])
def test_a_pair_is_too_long_if_either_side_is(tokenizer: Any, chosen: str, rejected: str) -> None:
    columns = pair_columns(tokenizer, [pair(chosen, rejected)], 60)
    assert (columns.rows, columns.too_long) == ((), ("p",))
    assert whole_conversations(columns).too_long == ("p",)
