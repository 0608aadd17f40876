"""Shared prefixes of prompts are found group by group."""

from hypothesis import given, settings
from hypothesis import strategies as st

from align.decoding.shared_prefixes import SharedPrefixes, find_shared_prefixes

SHARED = [[1, *range(20, 60), 90], [1, *range(20, 60), 91, 92, 93], [1, *range(60, 110), 7], [1, *range(60, 110), 8, 9]]


def test_shared_prefixes_are_found_by_group_and_leave_a_token_of_each_prompt():
    shared = find_shared_prefixes(SHARED)
    assert [shared.ids[group] for group in shared.of_row] == [SHARED[0][:41]] * 2 + [SHARED[2][:51]] * 2
    assert find_shared_prefixes([[1, 2, 3], [1, 2, 3]]) == SharedPrefixes([[1, 2]], [0, 0])
    assert find_shared_prefixes([[5, 6], [7, 8]]) == SharedPrefixes.none(2)
    assert find_shared_prefixes([[5, 6]]) == SharedPrefixes.none(1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=8))
def test_every_prompt_begins_with_its_prefix_and_is_longer(prompts):
    shared = find_shared_prefixes(prompts)
    for prompt, group in zip(prompts, shared.of_row, strict=True):
        prefix = shared.ids[group]
        assert prompt[: len(prefix)] == prefix and len(prefix) < len(prompt)
