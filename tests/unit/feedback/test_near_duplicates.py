"""Texts that nearly repeat an earlier one of their group are found, and others are not."""

from hypothesis import given
from hypothesis import strategies as st

from align.feedback.near_duplicates import NearDuplicateIndex

WORDS = [f"w{number}" for number in range(40)]


@given(st.permutations(WORDS), st.integers(0, 39))
def test_a_changed_word_among_forty_is_a_near_duplicate_and_other_words_are_not(words: list[str], place: int) -> None:
    earlier = NearDuplicateIndex(0.8)
    changed = [*words[:place], "other", *words[place + 1 :]]
    others = [f"{word}x" for word in words]

    # Three of 41 different shingles go and three come: 35 in 41 are common at the least.
    assert [earlier.is_repeated(" ".join(each)) for each in (words, changed, others, others)] == [
        False,
        True,
        False,
        True,
    ]


def test_groups_are_apart_and_short_texts_never_repeat() -> None:
    earlier, text = NearDuplicateIndex(0.8), " ".join(WORDS)

    assert [earlier.is_repeated(text, group) for group in ("sft", "preference", "sft")] == [False, False, True]
    assert [earlier.is_repeated("Yes, it is.") for _ in range(2)] == [False, False]
