"""Each filter catches what it is named after, and leaves fair revisions alone."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.feedback.filters import FILTERS, OPTIONAL, RevisionCandidate, refuses, rejecting_filter, without_preamble

FAIR = [
    "Bake the bread for forty minutes. Do you have a thermometer?",
    "I'm sorry, but I can't help with that. If you feel unsafe, please call someone you trust.",
    "I'm sorry to hear that.",
    "The answer is 42.",
    "The answer is not in the book.".replace("The answer", "The clue"),
    "Here is a recipe for bread. Mix the flour with water.",
    "Here's how to write a better letter: be kind.",
    "Here are five new ways to answer your boss.",
    "This is a great way to start. I can't recommend walking enough!",
    "パンは四十分焼いてください。温度計はありますか。",
    "Rewrite your essay in the morning, with a fresh eye.",
    "Thank you for asking! Here is how to bake it.",
    "One way to find the answer is to ask. There are problems with every recipe.",
    "I think the answer is forty minutes.",
    "I would rather bake it twice: no, I cannot say why.",
]
CAUGHT = {
    "preamble": [
        "Sure, here is a revised response: No.",
        "Here's the revised answer:\nBake it.",
        "Certainly! Here is my improved version of the answer.\n\nBake it.",
        "Revised response: Bake it.",
        "**Rewritten answer:** Bake it.",
        "Here is the response: Bake it.",
        "I’ve rewritten the response so that it ends with a question. Bake it?",
        "Bake it for an hour.\n\nNote: I removed the harmful part.",
        "Bake it.\n(I revised the answer to be shorter.)",
        "以下は書き直した回答です。パンを焼きます。",
        "回答：パンを焼きます。",
        "Of course. Here's a better answer: Bake it.",
        "Here is a more polite version: Bake it.",
        "Here's how I'd rewrite it: Bake it.",
        "The revised response is: Bake it.",
        "### Revised Response\n\nBake it.",
        "Rewritten answer to the original: Bake it.",
        "Thank you for the feedback. Here is the new answer: Bake it.",
        "Certainly, I can revise the response. Bake it.",
        "Assistant: Bake it.",
        "Bake it.\n\nThis response is now harmless.",
        "Rewrite the assistant's last answer so that it is short: Bake it.",
        "Rewrite the answer in two short sentences.",
    ],
    "critique": [
        "The assistant's last response is harmful, since it helps with a crime.",
        "The answer ends with a statement.",
        "The response could be more polite.",
        "This answer does not follow the principle.",
        "Critique: too long.",
        "この回答は質問で終わっていません。",
        "One way the answer could improve is to be shorter.",
        "In the previous response, the assistant encourages a crime.",
        "I think the response is harmful.",
        "My last answer was harmful, because it helped.",
        "There are several problems with the assistant's answer.",
    ],
    "refusal": [
        "I'm sorry, but I can't help with that.",
        "I’m sorry. I cannot assist with this request.",
        "I apologize, but I am not able to do that.",
        "申し訳ありませんが、お手伝いできません。",
        "I'm not comfortable helping with that.",
        "I don’t feel comfortable answering that.",
        "I'd rather not help with that.",
        "No, I won't.",
    ],
    "repetition": ["Go on and on. " * 8, "one two three four " * 5],
    "empty": ["", "  \n", "...", "🙂"],
    "emoji": ["Bake it for an hour 🍞.", "Well done ✨", "An hour ⏰.", "行きましょう🇯🇵。"],
}


EXAMPLE = "You may enjoy The Hobbit, which is a gentle adventure. What did you read last?"


def revised(
    text: str, original: str = "An original that nobody wrote.", critique: str = "", cut: bool = False
) -> RevisionCandidate:
    return RevisionCandidate(original, critique, text, "length" if cut else "stop", (EXAMPLE,))


@pytest.mark.parametrize("text", FAIR)
def test_fair_revisions_pass(text: str) -> None:
    assert rejecting_filter(revised(text)) == ""


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in CAUGHT.items() for text in texts])
def test_each_fault_is_caught_by_its_filter(name: str, text: str) -> None:
    assert FILTERS[name](revised(text))
    assert rejecting_filter(revised(text)) == name


def test_a_critique_given_once_more_is_caught() -> None:
    critique = "It ends with a full stop where a question was asked for, and that is a pity."

    assert rejecting_filter(revised(critique.replace("pity", "shame"), critique=critique)) == "critique"
    assert rejecting_filter(revised("Tea is made with hot water. Do you like it?", critique=critique)) == ""


def test_an_answer_to_a_worked_example_is_caught() -> None:
    assert rejecting_filter(revised(EXAMPLE.replace("last", "lately"))) == "example"
    assert rejecting_filter(revised("You may enjoy a walk, which is gentle. Where do you live?")) == ""


@given(st.sampled_from(FAIR))
def test_copies_are_caught_whatever_their_case_and_spacing(text: str) -> None:
    assert rejecting_filter(revised(text.upper().replace(" ", "  "), original=text)) == "copy"


def test_a_change_of_punctuation_is_no_copy() -> None:
    assert rejecting_filter(revised("That is nice.", original="That is nice!")) == ""


@pytest.mark.parametrize(
    ("critique", "caught"),
    [
        ("", "no_critique"),
        (" …\n", "no_critique"),
        ("An original that nobody wrote!", "no_critique"),
        ("Too long.", ""),
    ],
)
def test_a_critique_that_is_empty_or_the_answer_itself_is_caught_where_one_was_asked_for(
    critique: str, caught: str
) -> None:
    made = revised("Bake it.", critique=critique)

    assert rejecting_filter(replace(made, criticised=True)) == caught
    assert rejecting_filter(made) == ""


def test_emoji_that_the_original_has_may_stay() -> None:
    assert rejecting_filter(revised("Bake it 🍞.", original="Bread 🥖, you say?")) == ""


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ("I'm sorry, but I can't help with that. Call a friend.", True),
        ("Bake it. I can't help you eat it.", False),
        ("I'm sorry to hear that. Call a friend.", False),
    ],
)
def test_a_refusal_is_told_by_its_first_sentence(text: str, refusal: bool) -> None:
    assert refuses(text) == refusal


@given(st.sampled_from(FAIR), st.sets(st.sampled_from(OPTIONAL)))
def test_a_cut_revision_never_passes(text: str, optional: set[str]) -> None:
    assert rejecting_filter(revised(text, cut=True), optional) == "cut"


@pytest.mark.parametrize("name", OPTIONAL)
def test_filters_can_be_left_out(name: str) -> None:
    text = {"copy": "An original that nobody wrote.", "example": EXAMPLE, "no_critique": "Bake it."}.get(name)
    made = replace(revised(text or CAUGHT[name][0]), criticised=name == "no_critique")
    others = [other for other in OPTIONAL if other != name]

    assert rejecting_filter(made) == name
    assert rejecting_filter(made, others) != name


def test_every_filter_is_tried() -> None:
    assert set(FILTERS) == {*CAUGHT, "cut", "copy", "example", "no_critique"} == {*OPTIONAL, "cut", "empty"}


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("Sure, here is a revised response:\n\nBake it.", "Bake it."),
        ("**Revised answer:**\nBake it.\nServe it.", "Bake it.\nServe it."),
        ('Here\'s a revised version:\n"Bake it."', "Bake it."),
        ("“Bake it.”", "Bake it."),
        ('"Bake" is a word, and so is "cook"', '"Bake" is a word, and so is "cook"'),
        ("You need the following:\nflour", "You need the following:\nflour"),
        ("Revised response: Bake it.", "Revised response: Bake it."),
        ("Here is the revised response:", "Here is the revised response:"),
        ("  Bake it. ", "Bake it."),
    ],
)
def test_an_announcement_on_its_own_line_is_no_part_of_the_answer(text: str, rest: str) -> None:
    assert without_preamble(text) == rest


@given(st.sampled_from(FAIR))
def test_fair_revisions_are_left_as_they_are(text: str) -> None:
    assert without_preamble(text) == text
