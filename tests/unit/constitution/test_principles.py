"""Principles are drawn by their weights, and derive from their text what they do not give."""

from collections import Counter

from align.constitution.principles import Principle, draw_principle


def principle(name: str, weight: float = 1.0, applies: tuple[str, ...] = ()) -> Principle:
    return Principle(id=name, text=name, weight=weight, applies=applies)


def test_draws_follow_the_weights() -> None:
    principles = [principle("a", 1), principle("b", 2), principle("c", 5)]
    drawn = Counter(str(each.id) for n in range(8000) if (each := draw_principle(principles, 7, "round", n)))

    # Standard deviation of each count is at most 45.
    assert abs(drawn["a"] - 1000) < 150
    assert abs(drawn["b"] - 2000) < 180
    assert abs(drawn["c"] - 5000) < 200


def test_draws_depend_on_seed_and_names_alone() -> None:
    principles = [principle(name) for name in "abcdefgh"]

    def draws(seed: int) -> list[Principle | None]:
        return [draw_principle(principles, seed, "x", number) for number in range(20)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)


def test_only_principles_that_apply_are_drawn() -> None:
    principles = [principle("all"), principle("minors", applies=("minors",))]

    other = {each.id for n in range(50) if (each := draw_principle(principles, 0, n, category="weapons"))}
    theirs = {each.id for n in range(50) if (each := draw_principle(principles, 0, n, category="minors"))}
    assert other == {"all"}
    assert theirs == {"all", "minors"}
    assert draw_principle(principles[1:], 0, category="weapons") is None


def test_requests_and_question_come_from_the_text_where_they_are_not_given() -> None:
    plain = Principle(id="brief", text="Be brief.")
    comparing = Principle(id="c", compare="Choose the shorter.")

    assert plain.requests is not None and all("Be brief." in request for request in plain.requests)
    assert plain.question is not None and "Be brief." in plain.question
    assert comparing.requests is None
    assert Principle(id="r", critique="Is it?", revision="Mend it.").question is None
