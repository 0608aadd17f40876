"""The paper's published files come back byte for byte, and the loaded constitution has their worked examples."""

from pathlib import Path

import pytest

from align.constitution.loading import load_constitution
from align.constitution.paper import CRITIQUES, EXAMPLES, PROBES, QUESTIONS, REASONED
from align.constitution.paper_files import (
    COMPARISONS,
    Choice,
    parse_published,
    parse_transcript,
    render_choice,
    render_example,
    render_published,
    render_transcript,
)
from align.errors import InputError
from align.records import Message

PAPER = Path(__file__).parents[4] / "shared" / "data" / "cai-paper"
published = pytest.mark.skipif(not PAPER.is_dir(), reason="the paper's files are not on this machine")


@published
@pytest.mark.parametrize("name", [CRITIQUES, EXAMPLES, QUESTIONS, PROBES, REASONED, COMPARISONS])
def test_every_published_file_comes_back_byte_for_byte(name: str) -> None:
    assert render_published(name, parse_published(PAPER / name)) == (PAPER / name).read_bytes()


@published
def test_all_files_of_the_folder_are_known() -> None:
    assert {file.name for file in PAPER.iterdir()} == {CRITIQUES, EXAMPLES, QUESTIONS, PROBES, REASONED, COMPARISONS}


@published
def test_the_few_shot_prompts_of_the_loaded_constitution_are_the_paper_s_text() -> None:
    examples = load_constitution(PAPER).worked_examples
    texts = [render_transcript(turns) for turns in parse_published(PAPER / EXAMPLES)]

    assert len(examples) == len(texts) == 5
    assert sum(text.endswith("\n\nHuman:") for text in texts) == 4
    for example, text in zip(examples, texts, strict=True):
        rendered = render_example(
            example.conversation,
            example.completion,
            (example.critique_request or "", example.critique),
            (example.revision_request or "", example.revision),
            open_turn=text.endswith("\n\nHuman:"),
        )
        assert rendered == text


@published
def test_the_worked_choices_of_the_loaded_constitution_are_those_of_the_paper() -> None:
    constitution = load_constitution(PAPER)
    rows = parse_published(PAPER / PROBES)
    worked = {each.prompt[0].content: each for each in constitution.worked_comparisons if not each.reasoning}

    assert len(worked) == len(rows) == 5
    for row in rows:
        (_, said), (_, nothing) = row.transcript
        assert nothing == ""
        assert (worked[said].better, worked[said].worse) == (row.corrects[0], row.incorrects[0])
        assert constitution.principle(worked[said].principle or "").question


@published
def test_choices_are_rendered_as_in_the_paper() -> None:
    """Every question of the comparisons is one of the published sixteen, and each answer's letter is its text's."""
    questions = set(parse_published(PAPER / QUESTIONS))
    rows: list[Choice] = parse_published(PAPER / COMPARISONS)

    assert len(rows) == 219
    for row in rows:
        letter = row.other_keys["corrects"][0].strip(" ()")
        chosen = {"A": row.a, "B": row.b}[letter]
        assert row.other_keys["text_correct"].endswith(chosen)
    assert {row.question for row in rows} & questions


@published
def test_a_reasoned_choice_takes_its_question_in_the_one_place() -> None:
    choices = parse_published(PAPER / REASONED)

    assert len(choices) == 6
    assert all("Which {}?" in choice.with_question("Which {}?") for choice in choices)


def test_a_transcript_keeps_its_open_turn() -> None:
    text = "\n\nHuman: Hi.\n\n\n\nAssistant: Hello\n\nHuman:"

    assert parse_transcript(text) == (("Human", "Hi.\n\n"), ("Assistant", "Hello"), ("Human", ""))
    assert render_transcript(parse_transcript(text)) == text


@pytest.mark.parametrize("text", ["Human: Hi.", "\n\nHuman:Hi.", "x\n\nHuman: Hi."])
def test_other_text_is_not_a_transcript(text: str) -> None:
    with pytest.raises(ValueError, match="not a transcript"):
        parse_transcript(text)


def test_a_worked_example_and_a_choice_worked_by_hand() -> None:
    talk = (Message("user", "Hi {}."),)

    assert render_example(talk, "Go.", ("Kind?", "No."), ("Mend.", "Hello."), open_turn=True) == (
        "\n\nHuman: Hi {}.\n\nAssistant: Go.\n\nCritiqueRequest: Kind?\n\nCritique: No."
        "\n\nRevisionRequest: Mend.\n\nRevision: Hello.\n\nHuman:"
    )
    assert render_choice((("Human", "Hi."),), "Which?", "x", "y") == (
        "\n\nConsider the following conversation between a human and an assistant:\n\nHuman: Hi."
        "\n\n\nWhich? Options:\n (A) [[[x]]]\n (B) [[[y]]]\n\nThe answer is:"
    )


def test_files_that_are_not_the_paper_s_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[]")
    (tmp_path / QUESTIONS).write_text('["Which?"]')

    with pytest.raises(InputError, match="not one of the paper's files"):
        parse_published(tmp_path / "x.json")
    with pytest.raises(InputError, match="not in the form that the Constitutional AI paper published"):
        parse_published(tmp_path / QUESTIONS)
