"""Text metrics against values worked out by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.figures.text_metrics import distinct_share, repetition, same_ending_share, text_figures, words


def test_words_are_lower_cased_with_punctuation_apart():
    assert words("Don't stop, Go!") == ["don", "'", "t", "stop", ",", "go", "!"]


def test_unspaced_japanese_counts_by_character():
    assert words("猫はAIです。") == ["猫", "は", "ai", "で", "す", "。"]


def test_distinct_share_counts_over_all_completions():
    completions = ["a b a b", "a b"]
    assert distinct_share(completions, 1) == pytest.approx(2 / 6)
    assert distinct_share(completions, 2) == pytest.approx(2 / 4)


def test_ngrams_do_not_cross_from_one_completion_into_the_next():
    assert distinct_share(["a", "b"], 2) == 0.0


def test_repetition_share_worked_by_hand():
    assert repetition("one two three four one two three four") == pytest.approx(1 / 5)
    assert repetition("!" * 10) == pytest.approx(6 / 7)


@given(st.lists(st.integers(), unique=True, max_size=30))
def test_text_without_a_repeated_word_has_no_repetition(numbers):
    assert repetition(" ".join(f"w{abs(n)}{'m' if n < 0 else ''}" for n in numbers)) == 0.0


def test_same_ending_share_finds_a_closing_formula():
    completions = ["Yes. Hope this helps!", "No, never. hope this helps!", "Maybe."]
    assert same_ending_share(completions) == pytest.approx(2 / 3)


def test_same_ending_share_splits_japanese_sentences():
    assert same_ending_share(["はい。どうですか\uff1f", "いいえ。どうですか\uff1f"]) == 1.0


def test_text_figures_of_two_completions():
    figures = text_figures(["a b", "a c d"], [3, 5], ["stop", "length"])
    assert figures.mean_tokens == 4.0
    assert figures.mean_words == 2.5
    assert figures.distinct_1 == pytest.approx(4 / 5)
    assert figures.distinct_2 == 1.0
    assert (figures.repetition, figures.same_ending, figures.stopped) == (0.0, 0.5, 0.5)


def test_empty_completions_have_figures_and_no_completions_are_refused():
    assert text_figures([""], [1], ["stop"]).distinct_1 == 0.0
    with pytest.raises(ValueError, match="no completions"):
        text_figures([], [], [])
