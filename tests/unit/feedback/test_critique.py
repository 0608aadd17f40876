"""The loop of critique and revision: what is shown, what is drawn, what takes the completion's place."""

from pathlib import Path

import pytest

from align.constitution.constitution import Constitution
from align.constitution.principles import Example, Principle, Turn
from align.engines.engine import Completed, Request
from align.feedback.critique import CritiqueLoop, RevisionChain, nearest_examples
from align.feedback.judge import NO_PRINCIPLE
from align.records import Message, Sample
from align.settings.blocks import SamplingBlock
from tests.unit.feedback.engines import Engine

SAMPLING = SamplingBlock(max_new_tokens=20, temperature=0.7, batch_size=2)
KIND = Principle(id="kind", critique="Is it kind?", revision="Make it kind.")
BRIEF = Principle(id="brief", critique="Is it brief?", revision="Make it brief.")
TALK = (Message("system", "Be terse."), Message("user", "Hi."), Message("assistant", "Yes?"), Message("user", "Tea?"))


def constitution(*principles: Principle, examples: tuple[Example, ...] = ()) -> Constitution:
    return Constitution(id="test", title="test", principles=principles, examples=examples)


def sample(name: str = "s1", completion: str = "No!", category: str = "") -> Sample:
    return Sample(name, f"p-{name}", TALK, completion, "stop", "sft", category)


def numbered(request: Request) -> str:
    """Critiques and revisions that tell which sample, round and step they are of."""
    name, number, step = request.id.split("/")
    return f"{step} {number} of {name}"


def loop(engine: Engine, made: Constitution | None = None, **options: object) -> CritiqueLoop:
    return CritiqueLoop(made or constitution(KIND), engine, SAMPLING, seed=5, **options)  # type: ignore[arg-type]


def texts(request: Request) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in request.messages]


def test_each_round_shows_the_latest_completion_alone_with_the_whole_conversation() -> None:
    engine = Engine(numbered)
    loop(engine).run([sample()], rounds=2)

    talk = [(message.role, message.content) for message in TALK]
    critique1, revision1, critique2, revision2 = engine.requests
    assert texts(critique1) == [*talk, ("assistant", "No!"), ("user", "Is it kind?")]
    assert texts(revision1) == [
        *talk,
        ("assistant", "No!"),
        ("user", "Is it kind?"),
        ("assistant", "critique 1 of s1"),
        ("user", "Make it kind."),
    ]
    assert texts(critique2) == [*talk, ("assistant", "revision 1 of s1"), ("user", "Is it kind?")]
    assert "critique 1 of s1" not in [text for _, text in texts(revision2)]
    assert (critique1.max_new_tokens, critique1.temperature) == (20, 0.7)


def test_the_chain_holds_every_round() -> None:
    [chain] = loop(Engine(numbered)).run([sample()], rounds=2)

    assert chain.completion == "revision 2 of s1"
    assert [(row.round, row.completion, row.critique, row.revision) for row in chain.rounds] == [
        (1, "No!", "critique 1 of s1", "revision 1 of s1"),
        (2, "revision 1 of s1", "critique 2 of s1", "revision 2 of s1"),
    ]
    assert chain.fault == ""
    assert chain.principle_ids == ("kind", "kind")
    assert len({row.id for row in chain.rounds}) == 2


def test_the_critique_can_be_skipped() -> None:
    engine = Engine(numbered)
    [chain] = loop(engine, critique=False).run([sample()], rounds=1)

    assert [text for _, text in texts(engine.requests[0])][-2:] == ["No!", "Make it kind."]
    assert len(engine.requests) == 1
    assert chain.rounds[0].critique == ""


def test_principles_are_drawn_afresh_for_every_sample_and_round() -> None:
    samples = [sample(f"s{number}") for number in range(30)]
    chains = loop(Engine(numbered), constitution(KIND, BRIEF)).run(samples, rounds=2)
    again = loop(Engine(numbered), constitution(KIND, BRIEF)).run(samples[::-1], rounds=2)

    drawn = {chain.principle_ids for chain in chains}
    assert drawn == {(a, b) for a in ("kind", "brief") for b in ("kind", "brief")}
    assert chains == again[::-1]


def test_every_request_has_a_seed_of_its_own() -> None:
    engine = Engine(numbered)
    loop(engine).run([sample("s1"), sample("s2")], rounds=2)

    assert len({request.seed for request in engine.requests}) == 8


def test_a_sample_to_which_no_principle_applies_is_left_as_it_is() -> None:
    only = KIND.model_copy(update={"applies": ("talk",)})
    other, own = loop(Engine(numbered), constitution(only)).run(
        [sample("s1", category="x"), sample("s2", category="talk")], rounds=1
    )

    assert (other.fault, other.completion, other.rounds) == (NO_PRINCIPLE, "No!", ())
    assert own.completion == "revision 1 of s2"


def test_principles_for_comparing_are_not_drawn() -> None:
    made = constitution(Principle(id="choose", compare="Which?"), KIND)

    [chain] = loop(Engine(numbered), made).run([sample()], rounds=3)
    assert chain.principle_ids == ("kind",) * 3


def test_a_cut_revision_is_never_kept() -> None:
    def cut(request: Request) -> Completed:
        return Completed(request.id, numbered(request), "length", 20)

    [chain] = loop(Engine(cut)).run([sample()], rounds=2)

    assert (chain.completion, chain.fault, chain.faults) == ("No!", "cut", ("cut", "cut"))
    assert [row.finish_reason for row in chain.rounds] == ["length", "length"]


def test_a_bad_round_does_not_spoil_the_next_nor_the_one_before() -> None:
    def answer(request: Request) -> str:
        return "Sure, here is a revised response: no." if request.id.endswith("2/revision") else numbered(request)

    engine = Engine(answer)
    [chain] = loop(engine).run([sample()], rounds=3)

    assert chain.faults == ("", "preamble", "")
    assert (chain.fault, chain.completion) == ("", "revision 3 of s1")
    assert [row.completion for row in chain.rounds] == ["No!", "revision 1 of s1", "revision 1 of s1"]
    [two] = loop(Engine(answer)).run([sample()], rounds=2)
    assert (two.fault, two.completion) == ("", "revision 1 of s1")


def test_an_announcement_before_the_revision_is_taken_off_and_counted() -> None:
    engine = Engine(lambda request: "Here is the revised answer:\n\nYes, gladly.")
    [chain] = loop(engine, critique=False).run([sample()], rounds=1)

    assert (chain.completion, chain.fault, chain.preambles) == ("Yes, gladly.", "", 1)
    assert chain.rounds[0].revision == "Here is the revised answer:\n\nYes, gladly."


def test_rounds_that_lead_back_to_the_original_are_a_copy() -> None:
    there_and_back = Engine(lambda request: "Yes." if request.id.endswith("1/revision") else "No!")
    [chain] = loop(there_and_back, critique=False).run([sample()], rounds=2)

    assert (chain.completion, chain.fault) == ("No!", "copy")


def test_filters_can_be_left_out() -> None:
    [chain] = loop(Engine(lambda request: "No!"), critique=False, filters=()).run([sample()], rounds=1)

    assert chain.fault == ""


def example(prompt: str, principle: str | None = None, **own: str) -> Example:
    return Example(
        prompt=(Turn(role="user", content=prompt),),
        completion=f"{prompt} before",
        critique=f"{prompt} critique",
        revision=f"{prompt} after",
        principle=principle,
        **own,
    )


def test_worked_examples_come_first_as_turns_with_their_own_principle_s_requests() -> None:
    examples = (example("one", "brief"), example("two"), example("three", critique_request="Own?"))
    engine = Engine(numbered)
    made = constitution(KIND, BRIEF.model_copy(update={"applies": ("other",)}), examples=examples)
    loop(engine, made, examples=3).run([sample()], rounds=1)

    shown = [text for _, text in texts(engine.requests[0])]
    assert shown[0] == "Be terse."
    assert shown[1:19] == [
        *("three", "three before", "Own?", "three critique", "Make it kind.", "three after"),
        *("two", "two before", "Is it kind?", "two critique", "Make it kind.", "two after"),
        *("one", "one before", "Is it brief?", "one critique", "Make it brief.", "one after"),
    ]
    assert shown[19:] == ["Hi.", "Yes?", "Tea?", "No!", "Is it kind?"]
    roles = [role for role, _ in texts(engine.requests[0])][1:]
    assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]


def test_worked_examples_without_critiques_where_those_are_skipped() -> None:
    engine = Engine(numbered)
    loop(engine, constitution(KIND, examples=(example("one"),)), examples=1, critique=False).run([sample()], rounds=1)

    shown = [text for _, text in texts(engine.requests[0])]
    assert shown[1:5] == ["one", "one before", "Make it kind.", "one after"]


def test_an_answer_to_a_worked_example_is_not_kept() -> None:
    engine = Engine(lambda request: "One after!" if request.id.endswith("revision") else "hm")
    made = constitution(KIND, examples=(example("one"),))

    [shown] = loop(engine, made, examples=1).run([sample()], rounds=1)
    [hidden] = loop(engine, made, examples=0).run([sample()], rounds=1)
    assert (shown.fault, shown.completion) == ("example", "No!")
    assert (hidden.fault, hidden.completion) == ("", "One after!")


def test_the_principle_s_own_examples_are_taken_first_and_shown_last() -> None:
    examples = [example("a"), example("b", "brief"), example("c", "kind"), example("d")]

    assert [each.conversation[0].content for each in nearest_examples(examples, KIND, 2)] == ["a", "c"]
    assert nearest_examples(examples, KIND, 0) == ()


@pytest.mark.parametrize("death", [0, 1, 2, 5, 7, 9, 11])
def test_killed_and_resumed_equals_undisturbed(tmp_path: Path, death: int) -> None:
    samples = [sample(f"s{number}", "No!" * (number + 1)) for number in range(3)]

    def run(engine: Engine) -> list[RevisionChain]:
        engine.answer = lambda request: f"{numbered(request)} with {' '.join(engine.batches[-1])}"
        return loop(engine, journal_path=tmp_path / "steps.journal").run(samples, rounds=2)

    with pytest.raises(KeyboardInterrupt):
        run(Engine(dies_after=death))
    resumed = run(Engine())
    for journal in tmp_path.iterdir():
        journal.unlink()

    assert resumed == run(Engine())


def test_another_engine_may_write_the_critiques() -> None:
    critic, reviser = Engine(lambda request: "Too short."), Engine(numbered)
    loop(reviser, critic=critic).run([sample()], rounds=1)

    assert [request.id for request in critic.requests] == ["s1/1/critique"]
    assert [request.id for request in reviser.requests] == ["s1/1/revision"]
    assert ("assistant", "Too short.") in texts(reviser.requests[0])
