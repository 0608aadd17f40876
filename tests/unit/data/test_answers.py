"""The answer in what thinking and channel models write, with the chat templates that TRL ships."""

from pathlib import Path

import pytest
import trl
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from align.data.answers import Answer, AnswerReader, answer_in_text
from align.data.chat import prompt_ids, whole_ids
from align.records import Message
from tests.tiny import build_tokenizer

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
PROMPT = (Message("user", "Where is the cat?"),)
ANSWER = "On the mat."
SPECIAL = ["<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|return|>", "<|channel>", "<channel|>", "<|turn>"]

WRITTEN = {
    "qwen3": "<think>\nCats like mats.\n</think>\n\n",
    "qwen3_5_think": "Cats like mats.\n</think>\n\n",
    "qwen3_6": "Cats like mats.\n</think>\n\n",
    "deepseek_r1_distill": "Cats like mats.\n</think>\n\n",
    "glm4moe": "\n<think>Cats like mats.</think>\n",
    "nemotron_3_nano": "Cats like mats.\n</think>\n",
    "gptoss": "<|channel|>analysis<|message|>Cats like mats.<|end|><|start|>assistant<|channel|>final<|message|>",
    "gemma4": "<|channel>thought\nCats like mats.<channel|>",
}
"""By template, the thought that its model writes after the prompt."""


def tokenizer_of(template: str) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with a template that TRL ships, and the marks that are special tokens in its family."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
    return tokenizer


def read(template: str, written: str) -> Answer:
    tokenizer = tokenizer_of(template)
    return AnswerReader(tokenizer).read(prompt_ids(tokenizer, PROMPT), tokenizer(written)["input_ids"])


@pytest.mark.parametrize(("template", "thought"), WRITTEN.items())
def test_the_answer_is_what_follows_the_thought(template: str, thought: str) -> None:
    assert read(template, thought + ANSWER) == Answer(ANSWER, thought.rstrip())


@pytest.mark.parametrize(("template", "thought"), WRITTEN.items())
@pytest.mark.parametrize("kept", [1.0, 0.6])
def test_a_thought_that_the_limit_cut_is_no_answer(template: str, thought: str, kept: float) -> None:
    whole = thought.rstrip()
    cut = whole[: int(len(whole) * kept) - 3]
    assert read(template, cut) == Answer("", cut, given=False)


@pytest.mark.parametrize(("template", "thought"), WRITTEN.items())
def test_a_thought_after_which_nothing_was_said_is_no_answer(template: str, thought: str) -> None:
    found = read(template, thought)
    assert (found.text, found.given) == ("", False)


@pytest.mark.parametrize("template", ["qwen3", "gptoss", "gemma4"])
def test_an_answer_without_a_thought_is_an_answer(template: str) -> None:
    assert read(template, ANSWER) == Answer(ANSWER)


def test_gpt_oss_may_answer_at_once() -> None:
    opening = "<|channel|>final<|message|>"
    assert read("gptoss", opening + ANSWER) == Answer(ANSWER, opening)


def test_a_stray_end_of_a_thought_ends_one() -> None:
    """Qwen3.5 without thinking: its template too would drop what stands before the mark."""
    assert read("qwen3_5_nothink", "It is\n</think>\n\nOn the mat.") == Answer(ANSWER, "It is\n</think>")


def test_an_answer_may_quote_the_marks() -> None:
    quoting = "Write <think>x</think> first."
    assert read("qwen3", quoting) == Answer(quoting)
    assert read("qwen3", f"<think>y</think>{quoting}") == Answer(quoting, "<think>y</think>")


def test_two_thoughts_in_a_row_are_thoughts() -> None:
    assert read("qwen3", "<think>a</think>\n<think>b</think>Yes.") == Answer(
        "Yes.", "<think>a</think>\n<think>b</think>"
    )
    assert read("qwen3", "<think>a</think>\n<think>b").given is False


@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=40))
def test_models_without_thoughts_answer_with_all_that_they_write(text: str) -> None:
    tokenizer = build_tokenizer()
    reader = AnswerReader(tokenizer)
    assert not reader.thinks
    ids = tokenizer(f"<think>{text}")["input_ids"]
    assert reader.read([], ids) == Answer(tokenizer.decode(ids, skip_special_tokens=True))


def test_the_answer_in_a_servers_text() -> None:
    assert answer_in_text(ANSWER) == Answer(ANSWER)
    assert answer_in_text("") == Answer("")
    assert answer_in_text(f"<think>\nhm\n</think>\n\n{ANSWER}") == Answer(ANSWER, "<think>\nhm\n</think>")
    assert answer_in_text(f"hm\n</think>\n\n{ANSWER}") == Answer(ANSWER, "hm\n</think>")
    assert answer_in_text("<think>\nhm") == Answer("", "<think>\nhm", given=False)
    assert answer_in_text("Use <think> and </think>.") == Answer("Use <think> and </think>.")


RENDERED = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
TALK = [{"role": "user", "content": "Where is the cat?"}, {"role": "assistant", "content": ANSWER}]


@pytest.mark.parametrize("template", RENDERED)
def test_a_whole_conversation_has_the_templates_own_ids_and_a_cut_one_ends_with_its_words(template: str) -> None:
    tokenizer = tokenizer_of(template)
    try:
        expected = tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=False)
    except (TypeError, ValueError, TemplateError):
        expected = []
    if ANSWER not in tokenizer.decode(expected):
        pytest.skip("this template reads messages whose contents are lists of parts")
    assert whole_ids(tokenizer, PROMPT, ANSWER) == expected
    cut = tokenizer.decode(whole_ids(tokenizer, PROMPT, ANSWER, finished=False))
    assert cut.endswith(ANSWER) and tokenizer.decode(expected).startswith(cut)
