"""How prompts are scheduled."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from align.records import Message, Prompt
from align.rl.rollout import TokenizedPrompt, schedule


def prompt(number: int, length: int = 3) -> TokenizedPrompt:
    return TokenizedPrompt(Prompt(f"p{number}", (Message("user", str(number)),), "rl"), tuple(range(1, length + 1)))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 7), st.integers(0, 1000))
def test_every_prompt_is_used_once_before_any_is_used_again(count, batch, seed):
    prompts = [prompt(number) for number in range(count)]
    iterations = range(4 * count // batch + 1)
    drawn = [row for iteration in iterations for row in schedule(prompts, batch, iteration, seed)]
    for turn in range(len(drawn) // count):
        assert Counter(row.prompt.id for row in drawn[turn * count : (turn + 1) * count]) == Counter(
            row.prompt.id for row in prompts
        )


def test_another_seed_is_another_order():
    prompts = [prompt(number) for number in range(50)]
    assert schedule(prompts, 50, 0, 1) != schedule(prompts, 50, 0, 2)
    assert schedule(prompts, 50, 0, 1) != schedule(prompts, 50, 1, 1), "the next time round is shuffled anew"
