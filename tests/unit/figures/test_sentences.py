"""Sentences and words are counted as a reader would count them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.figures.sentences import count_sentences, count_words, fold, sentences


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("   \n", []),
        ("?!", []),
        ("🙂", []),
        ("Hello", ["Hello"]),
        ("Hello there. How are you?  ", ["Hello there.", "How are you?"]),
        ("It costs 3.50 dollars at example.com today.", ["It costs 3.50 dollars at example.com today."]),
        ("Mr. Smith met Dr. No, e.g. at noon.", ["Mr. Smith met Dr. No, e.g. at noon."]),
        ("J. K. Rowling wrote it. I read it.", ["J. K. Rowling wrote it.", "I read it."]),
        ("The U.S. Army came at 5 p.m. yesterday.", ["The U.S. Army came at 5 p.m. yesterday."]),
        ("I live in the U.S. The food is good.", ["I live in the U.S.", "The food is good."]),
        ("Take pears, plums, etc. and cook. Then eat.", ["Take pears, plums, etc. and cook.", "Then eat."]),
        ("Take pears, plums, etc. Then eat.", ["Take pears, plums, etc.", "Then eat."]),
        ("The answer is no. Ask again.", ["The answer is no.", "Ask again."]),
        ("Wait... what? Yes!", ["Wait... what?", "Yes!"]),
        ("Really?! Yes.", ["Really?!", "Yes."]),
        ("“Stop!” he said. Then he left.", ["“Stop!” he said.", "Then he left."]),
        ("She said “Stop!” Then she left.", ["She said “Stop!”", "Then she left."]),
        ("(This counts.) So does this.", ["(This counts.)", "So does this."]),
        ("all in lower case. even this.", ["all in lower case.", "even this."]),
        ("I have 2. You have 3.", ["I have 2.", "You have 3."]),
        ("A line that a wrap\nbroke off. And\nmore.", ["A line that a wrap broke off.", "And more."]),
        ("Title\nThe text starts here.", ["Title", "The text starts here."]),
        ("1. Boil water.\n2. Add tea.", ["Boil water.", "Add tea."]),
        ("- apples\n- pears\n\n* plums", ["apples", "pears", "plums"]),
        ("これは本です。あれは？はい！", ["これは本です。", "あれは？", "はい！"]),
        ("「本です。」と言った。終わり。", ["「本です。」と言った。", "終わり。"]),
        ("Is it？ Yes！", ["Is it？", "Yes！"]),
    ],
)
def test_sentences_of(text: str, expected: list[str]) -> None:
    assert sentences(text) == expected


WORDS = st.lists(st.sampled_from(["cat", "dog", "runs", "sees", "42", "blue"]), min_size=1, max_size=5)
SENTENCE = st.tuples(WORDS, st.sampled_from([".", "!", "?", "?!"])).map(
    lambda parts: " ".join(["The", *parts[0], "today"]) + parts[1]
)


@given(st.lists(SENTENCE, min_size=1, max_size=6), st.sampled_from([" ", "  ", "\n", "\n\n"]))
def test_plain_sentences_are_found_with_any_space_between_them(made: list[str], between: str) -> None:
    assert sentences(between.join(made)) == made


@given(st.text(max_size=80))
def test_white_space_around_a_text_changes_nothing(text: str) -> None:
    assert sentences(f"  {text}\n ") == sentences(f"  {text}")
    assert sentences(f"\n\n{text}") == sentences(text)


@given(st.text(max_size=80))
def test_every_sentence_has_a_letter_or_digit(text: str) -> None:
    assert all(any(character.isalnum() for character in sentence) for sentence in sentences(text))


@given(st.text(max_size=60), SENTENCE)
def test_another_paragraph_adds_its_sentences(text: str, added: str) -> None:
    assert count_sentences(f"{text}\n\n{added}") == count_sentences(text) + 1


@pytest.mark.parametrize(
    ("text", "count"),
    [("", 0), ("one", 1), ("It's a well-known fact, isn't it?", 6), ("猫が好き", 4), ("AIは便利", 4), ("a - b", 2)],
)
def test_words_are_counted(text: str, count: int) -> None:
    assert count_words(text) == count


def test_full_width_and_emoji_marks_fold_to_plain_ones() -> None:
    assert fold("ＡＢＣ！？\u3000❗❓‼") == "abc!? !?!!"
