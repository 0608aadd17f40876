"""Every layout is recognised without a word, and gives the same pair, demonstration and prompt."""

import contextlib
import copy
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from align.data.demonstrations import read_demonstrations
from align.data.layouts import LAYOUTS, recognise
from align.data.pairs import read_pairs
from align.data.prompts import ODD_SPLIT, read_prompts, stream_prompts
from align.data.sources import LEFT_OUT, Intake, open_intake
from align.errors import InputError
from align.records import Message, read_jsonl
from align.settings.data import PairSource, PromptsBlock, PromptSource
from tests.unit.data.layout_rows import BAD, CHOSEN, DEMONSTRATIONS, EVERY, GOOD, PAIRS, QUESTION, REJECTED, USER
from tests.unit.data.pair_files import write

USER_TURN = (Message("user", QUESTION),)


def source(tmp_path: Path, *rows: Any, **options: Any) -> PairSource:
    return PairSource(path=write(tmp_path / "rows.jsonl", *rows).path, **options)


def prompts(tmp_path: Path, *rows: Any, intake: Intake | None = None, **options: Any) -> list[Any]:
    found = PromptSource(path=write(tmp_path / "rows.jsonl", *rows).path, **options)
    return list(stream_prompts(PromptsBlock(sources=(found,)), intake))


def test_there_is_an_example_of_each_layout() -> None:
    assert {layout.name for layout in LAYOUTS} == EVERY.keys()


@pytest.mark.parametrize("name", EVERY)
def test_a_layout_is_recognised(name: str) -> None:
    assert {layout.name for row in EVERY[name] if (layout := recognise(row))} == {name}


@pytest.mark.parametrize("name", PAIRS)
def test_a_layout_of_pairs_gives_the_pair(tmp_path: Path, name: str) -> None:
    (pair,) = read_pairs(source(tmp_path, *PAIRS[name]))

    assert (pair.prompt, pair.chosen[0].content, pair.rejected[0].content) == (USER_TURN, GOOD, BAD)
    assert pair.probability == 1


@pytest.mark.parametrize("name", sorted(EVERY.keys() - {"prompts", "HelpSteer 2", "rated answers", "HelpSteer 3"}))
def test_a_layout_with_answers_gives_the_better_one_as_demonstration(tmp_path: Path, name: str) -> None:
    (demonstration,) = read_demonstrations(source(tmp_path, *EVERY[name]))

    assert (demonstration.prompt, demonstration.completion) == (USER_TURN, GOOD)


@pytest.mark.parametrize("name", EVERY)
def test_every_layout_gives_its_prompt(tmp_path: Path, name: str) -> None:
    (prompt,) = prompts(tmp_path, *EVERY[name])

    assert prompt.prompt == USER_TURN


def test_messages_are_converted_as_trl_does(tmp_path: Path) -> None:
    from trl.data_utils import maybe_convert_to_chatml

    talk = [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}, {"from": "user", "value": "c"}]
    whole = [*talk, {"from": "assistant", "value": "d"}]
    expected = maybe_convert_to_chatml(copy.deepcopy({"conversations": whole}))["messages"]
    (demonstration,) = read_demonstrations(source(tmp_path, {"conversations": whole}))

    said = [*demonstration.prompt, Message("assistant", demonstration.completion)]
    assert [message.as_dict() for message in said] == expected


def test_implicit_prompts_are_found_as_trl_finds_them(tmp_path: Path) -> None:
    from trl.data_utils import extract_prompt

    row = {"chosen": [USER, CHOSEN, USER, CHOSEN], "rejected": [USER, CHOSEN, USER, REJECTED]}
    expected = extract_prompt(row)
    (pair,) = read_pairs(source(tmp_path, row))

    for key in ("prompt", "chosen", "rejected"):
        assert [message.as_dict() for message in getattr(pair, key)] == expected[key]


def test_ratings_that_trl_makes_of_pairs_give_the_pairs_back(tmp_path: Path) -> None:
    import datasets
    from trl.data_utils import unpair_preference_dataset

    rows = [{"prompt": f"p{n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(5)]
    unpaired = unpair_preference_dataset(datasets.Dataset.from_list(rows)).to_list()

    assert {row["label"] for row in unpaired} == {True, False}
    made = read_pairs(source(tmp_path, *unpaired))
    assert {pair.id for pair in made} == {pair.id for pair in read_pairs(source(tmp_path, *rows))}


def test_all_pairs_of_ranked_answers_where_the_recipe_asks(tmp_path: Path) -> None:
    pairs = read_pairs(source(tmp_path, *PAIRS["Nectar"], ranked_pairs="all"))

    found = [(pair.chosen[0].content, pair.rejected[0].content) for pair in pairs]
    assert found == [(GOOD, "A river."), (GOOD, BAD), ("A river.", BAD)]


@pytest.mark.parametrize(
    ("name", "margin"),
    [("scored pairs (UltraFeedback, binarised)", 2.5), ("HelpSteer 3", 3), ("HelpSteer 2", 4), ("UltraFeedback", 3.5)],
)
def test_scores_become_soft_labels_where_the_recipe_asks(tmp_path: Path, name: str, margin: float) -> None:
    (pair,) = read_pairs(source(tmp_path, *PAIRS[name], margin_scale=0.5))

    assert pair.probability == pytest.approx(1 / (1 + math.exp(-0.5 * margin)))


def test_scores_that_are_equal_or_say_the_opposite_are_not_certain(tmp_path: Path) -> None:
    rows = [
        {"prompt": str(number), "chosen": GOOD, "rejected": BAD, "score_chosen": chosen, "score_rejected": rejected}
        for number, (chosen, rejected) in enumerate([(3, 3), (2, 4), ("5", "1")])
    ]
    intake = Intake()
    (certain,) = read_pairs(source(tmp_path, *rows), intake)
    equal, swapped, clear = read_pairs(source(tmp_path, *rows, margin_scale=1))

    assert certain.prompt[0].content == "2"
    assert intake.counts == {"pairs_with_equal_scores": 1, "pairs_scored_the_other_way": 1}
    assert (equal.probability, swapped.chosen[0].content) == (0.5, BAD)
    assert swapped.probability == pytest.approx(1 / (1 + math.exp(-2)))
    assert clear.probability == pytest.approx(1 / (1 + math.exp(-4)))


def test_ratings_without_a_counterpart_make_no_pair(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "completion": "1", "label": True},
        {"prompt": "b", "completion": "2", "label": True},
        {"prompt": "a", "completion": "3", "label": "false"},
        {"prompt": "a", "completion": "4", "label": 0},
    ]
    intake = Intake()
    (pair,) = read_pairs(source(tmp_path, *rows), intake)

    assert (pair.prompt[0].content, pair.chosen[0].content, pair.rejected[0].content) == ("a", "1", "3")
    assert intake.counts == {"pairs_without_a_counterpart": 2}


def test_an_answer_labelled_as_bad_is_never_taught(tmp_path: Path) -> None:
    intake = Intake()
    (demonstration,) = read_demonstrations(source(tmp_path, *PAIRS["KTO"]), intake)

    assert demonstration.completion == GOOD
    assert intake.counts["demonstrations_labelled_as_bad"] == 1


def test_a_mapping_reads_any_other_layout(tmp_path: Path) -> None:
    row = {"ask": "Hi", "replies": [{"text": "Yes."}, {"text": "No."}], "who": "me", "prompt": "not this"}
    columns = {"prompt": "ask", "chosen": "replies.0.text", "rejected": "replies.1.text", "system": "who"}
    (pair,) = read_pairs(source(tmp_path, row, columns=columns))

    assert pair.prompt == (Message("system", "me"), Message("user", "Hi"))
    assert (pair.chosen[0].content, pair.rejected[0].content) == ("Yes.", "No.")
    with pytest.raises(InputError, match=r"no column `nothing`; the row's columns are ask, replies, who, prompt"):
        read_pairs(source(tmp_path, row, columns={**columns, "chosen": "nothing"}))


def test_a_mapping_may_choose_what_decides(tmp_path: Path) -> None:
    (row,) = PAIRS["PKU-SafeRLHF"]
    names = ("prompt", "response_0", "response_1")
    columns = {**{name: name for name in names}, "better_response_id": "safer_response_id"}
    (pair,) = read_pairs(source(tmp_path, row, columns=columns))

    assert pair.chosen[0].content == BAD


@pytest.mark.parametrize("column", ["system", "system_prompt"])
def test_a_system_column_is_the_first_message(tmp_path: Path, column: str) -> None:
    row = {column: "Be a pirate.", "question": "Who?", "response": "Arr."}
    expected = (Message("system", "Be a pirate."), Message("user", "Who?"))

    assert read_demonstrations(source(tmp_path, row))[0].prompt == expected
    assert prompts(tmp_path, row)[0].prompt == expected
    pair = {column: "Be a pirate.", "question": "Who?", "chosen": "Arr.", "rejected": "No."}
    assert read_pairs(source(tmp_path, pair))[0].prompt == expected


def test_two_system_messages_that_differ_are_refused(tmp_path: Path) -> None:
    row = {"system": "One.", "messages": [{"role": "system", "content": "Two."}, USER, CHOSEN]}

    with pytest.raises(InputError, match="line 1: `system` says something else"):
        read_demonstrations(source(tmp_path, row))
    row["system"] = "Two."
    assert len(read_demonstrations(source(tmp_path, row))[0].prompt) == 2


def test_messages_as_json_text_are_messages(tmp_path: Path) -> None:
    import json

    talk = [USER, CHOSEN]
    (demonstration,) = read_demonstrations(source(tmp_path, {"messages": json.dumps(talk)}))
    (pair,) = read_pairs(source(tmp_path, {"chosen": json.dumps(talk), "rejected": json.dumps([USER, REJECTED])}))

    assert (demonstration.prompt, pair.prompt) == (USER_TURN, USER_TURN)
    with pytest.raises(InputError, match="`chosen` holds messages as text that is not JSON"):
        read_pairs(source(tmp_path, {"prompt": "a", "chosen": str(talk), "rejected": "b"}))


def test_text_parts_are_joined_and_others_refused(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Name a "}, {"type": "text", "text": "river."}]
    (prompt,) = prompts(tmp_path, {"prompt": [{"role": "user", "content": parts}]})

    assert prompt.prompt == USER_TURN
    with pytest.raises(InputError, match="a part of type 'image'"):
        prompts(tmp_path, {"prompt": [{"role": "user", "content": [{"type": "image", "image": "x"}]}]})


def test_tool_turns_are_kept_as_they_are(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
    results = [{"role": "tool", "content": text, "tool_call_id": text} for text in ("1", "2")]
    (demonstration,) = read_demonstrations(source(tmp_path, {"messages": [USER, call, *results, CHOSEN]}))

    said = [message.as_dict() for message in demonstration.prompt]
    assert said == [USER, {**call, "content": ""}, *results]
    assert type(demonstration).from_json(demonstration.to_json()) == demonstration
    with pytest.raises(InputError, match="line 1: the answer calls tools"):
        read_demonstrations(source(tmp_path, {"messages": [USER, call]}))
    with pytest.raises(InputError, match="line 1: declares `tools`"):
        read_demonstrations(source(tmp_path, {"messages": [USER, CHOSEN], "tools": "[{}]"}))


def test_a_null_content_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one of them has no content"):
        prompts(tmp_path, {"prompt": [{"role": "user", "content": None}]})


@pytest.mark.parametrize(
    ("category", "expected"),
    [({"violence": True, "theft": False, "fraud": True}, "violence, fraud"), (["a"], "a"), (None, ""), ("b", "b")],
)
def test_a_map_or_list_of_categories_gives_those_that_hold(tmp_path: Path, category: Any, expected: str) -> None:
    assert prompts(tmp_path, {"prompt": "p", "category": category})[0].category == expected


def test_another_kind_of_split_column_leaves_the_split_to_the_shares(tmp_path: Path) -> None:
    intake, numbers = Intake(), [str(number) for number in range(50)]
    found = prompts(tmp_path, *({"prompt": number, "split": "train"} for number in numbers), intake=intake)
    without = prompts(tmp_path, *({"prompt": number} for number in numbers))

    assert [each.split for each in found] == [each.split for each in without]
    assert intake.counts[ODD_SPLIT] == 50


def test_unusable_rows_are_kept_aside_up_to_the_share(tmp_path: Path) -> None:
    rows = [{"prompt": str(number)} for number in range(97)] + [{"prompt": " "}, {"text": "a"}]
    path = Path(write(tmp_path / "rows.jsonl", *rows).path)
    path.write_text(path.read_text() + '{"prompt": \n')
    counts: Counter[str] = Counter()
    block = PromptsBlock(sources=(PromptSource(path=str(path), max_unusable=0.03),))
    with open_intake(tmp_path, counts) as intake:
        assert len(list(stream_prompts(block, intake))) == 97

    kept = list(read_jsonl(tmp_path / LEFT_OUT))
    assert counts["prompts_unusable"] == 3
    assert [row["place"] for row in kept] == [f"{path}, line {number}" for number in (98, 99, 100)]
    assert ["is empty" in kept[0]["why"], "no column" in kept[1]["why"], "not JSON" in kept[2]["why"]] == [True] * 3
    with pytest.raises(InputError, match=r"3 of 100 rows cannot be used, and `max_unusable` allows a share of 0\.02"):
        read_prompts(PromptsBlock(sources=(PromptSource(path=str(path)),)))


def test_a_source_of_which_nothing_fits_ends_early(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none of the first 100 rows can be used"):
        prompts(tmp_path, *({"text": "a"} for _ in range(1000)))


def test_bad_values_in_a_known_layout_name_the_row(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"line 1: has the columns of KTO.*`label` must be true or false"):
        read_pairs(source(tmp_path, {"prompt": "p", "completion": "c", "label": "maybe"}))
    with pytest.raises(InputError, match="line 1: `score` must be a number, got 'high'"):
        read_pairs(source(tmp_path, {"prompt": "p", "completion": "c", "score": "high"}))


@pytest.mark.parametrize("name", DEMONSTRATIONS)
def test_demonstrations_are_no_pairs(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="line 1: no column `chosen`, `rejected`"):
        read_pairs(source(tmp_path, *DEMONSTRATIONS[name]))


def paths(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where every value inside a row stands."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [above, *(path for key, item in inner for path in paths(item, (*above, key)))][0 if above else 1 :]


ODD_VALUES = st.sampled_from(
    [
        None,
        "",
        " ",
        0,
        -1,
        2.5,
        float("nan"),
        True,
        [],
        {},
        [None],
        [{}],
        "[{",
        [[]],
        {"role": 3},
        "\n\nHuman:",
        "x" * 99,
    ]
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(EVERY)), st.data())
def test_a_row_with_any_odd_value_is_read_or_refused_in_words(tmp_path: Path, name: str, data: st.DataObject) -> None:
    rows = copy.deepcopy(EVERY[name])
    row = data.draw(st.sampled_from(rows))
    *outer, last = data.draw(st.sampled_from(paths(row)))
    place = row
    for key in outer:
        place = place[key]
    place[last] = data.draw(ODD_VALUES)
    found = source(tmp_path, *rows, max_unusable=1.0, ranked_pairs="all")

    for read in (read_pairs, read_demonstrations):
        with contextlib.suppress(InputError):
            read(found)
    with contextlib.suppress(InputError):
        prompts(tmp_path, *rows, max_unusable=1.0)
