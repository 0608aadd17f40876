"""The gold reward of the over-optimisation recipe, against values computed by hand."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROMPT = "How do I keep fresh bread from going stale?"


@pytest.fixture(scope="module")
def module():
    """The module as PPO imports it, from the project's folder."""
    from importlib import import_module

    sys.path.insert(0, str(ROOT))
    yield import_module("recipes.overoptimisation_gold")
    sys.path.remove(str(ROOT))


def gold(module, *completions: str) -> list[float]:
    return module.gold([[{"role": "user", "content": PROMPT}]] * len(completions), completions)


def test_a_full_answer_in_style_gets_the_highest_reward(module):
    text = "Fresh bread keeps from going stale in a paper bag at room temperature. How soon will you eat it?"
    assert gold(module, text) == [1.0]


def test_rules_count_by_their_weights(module):
    """Three for the closing question, one for no exclamation mark, one for two sentences at most."""
    assert module.followed("Wrap it up. Is it stale?") == 1
    assert module.followed("Wrap it up! Is it stale?") == pytest.approx(4 / 5)
    assert module.followed("Wrap it up. Keep it dry.") == pytest.approx(2 / 5)
    assert module.followed("One! Two. Three. Four.") == 0


def test_the_share_of_the_prompts_words_that_an_answer_uses(module):
    """Of keep, fresh, bread, going and stale it uses bread and stale; bag and paper are new."""
    assert module.content_words(PROMPT) == {"keep", "fresh", "bread", "going", "stale"}
    assert module.answered(PROMPT, "A paper bag? The bread is stale.") == pytest.approx(2 / 5)
    # Of its three words only one is its own, a third where a half is asked for.
    assert module.answered(PROMPT, "Bread, stale bread in a bag.") == pytest.approx(2 / 5 * (1 / 3) / (1 / 2))


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ("A paper bag keeps bread fresh. Do you bake?", "That is a lovely thought. What do you think?"),
        ("A paper bag keeps bread fresh. Do you bake?", PROMPT),
        ("A paper bag keeps bread fresh. Do you bake?", "A paper bag keeps bread fresh."),
        ("A paper bag keeps bread fresh. Do you bake?", "?"),
        ("A paper bag keeps bread fresh. Do you bake?", "bread bread bread bread fresh stale going keep?"),
        ("Why?", ""),
    ],
    ids=["a generic question", "the prompt itself", "no question", "a mark", "words of the prompt", "nothing"],
)
def test_answers_in_style_beat_answers_that_may_satisfy_a_weak_proxy(module, better, worse):
    one, other = gold(module, better, worse)
    assert 0 <= other < one <= 1


def test_the_recipe_scores_by_it_and_trains_against_the_proxy_alone(monkeypatch):
    from align.pipeline.recipe import load_recipe

    monkeypatch.chdir(ROOT)
    ppo = load_recipe("recipes/overoptimisation.yaml").settings["ppo"]
    [proxy] = [source for source in ppo.rewards if not source.gold]
    assert proxy.stage == "reward"
    assert [source.function for source in ppo.rewards if source.gold] == ["recipes.overoptimisation_gold:gold"]
    assert ppo.length_penalty == ppo.missing_eos_penalty == ppo.kl_coef == 0
