"""Preference pairs and demonstrations of every supported format."""

import gzip
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from align.data.conversations import parse_transcript
from align.data.demonstrations import read_demonstrations
from align.data.pairs import read_pairs
from align.data.sources import Intake
from align.errors import InputError
from align.records import Message, write_rows
from align.settings.data import PairSource
from tests.unit.data.pair_files import one, write

HH_RLHF = Path(__file__).parents[4] / "shared/data/hh-rlhf/harmless-base.jsonl.gz"
HHH = HH_RLHF.parents[1] / "cai-paper/hhh_comparisons.jsonl"
USER = {"role": "user", "content": "Say hello."}
GOOD = {"role": "assistant", "content": "Hello: how are you?"}
BAD = {"role": "assistant", "content": "No."}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": USER["content"], "chosen": GOOD["content"], "rejected": BAD["content"]},
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": USER["content"], "chosen": [USER, GOOD], "rejected": [USER, BAD], "extra": 3},
        {
            "chosen": "\n\nHuman: Say hello.\n\nAssistant: Hello: how are you?",
            "rejected": "\n\nHuman: Say hello.\n\nAssistant: No.",
        },
        {"prompt": "\n\nHuman: Say hello.\n\nAssistant:", "chosen": " Hello: how are you?", "rejected": " No."},
        {"prompt": "\n\nHuman: Say hello.", "chosen": GOOD["content"], "rejected": BAD["content"]},
        {"prompt": "\n\nHuman: Say hello.\n\nAssistant: ", "chosen": [GOOD], "rejected": [BAD]},
        {
            "prompt": USER["content"],
            "chosen": "\n\nHuman: Say hello.\n\nAssistant: Hello: how are you?",
            "rejected": "\n\nHuman: Say hello.\n\nAssistant: No.",
        },
        {
            "prompt": "\n\nHuman: Say hello.\n\nAssistant:",
            "chosen": "\n\nHuman: Say hello.\n\nAssistant: Hello: how are you?",
            "rejected": "\n\nHuman: Say hello.\n\nAssistant: No.",
        },
        {
            "prompt": [{**USER, "content": "Say hello."}],
            "chosen": "\n\nAssistant: Hello: how are you?",
            "rejected": "\n\nAssistant: No.",
        },
        {
            "prompt": "\n\nConsider … Options:\n (A) [[[No.]]]\n (B) [[[Hello: how are you?]]]",
            "corrects": [" (B)"],
            "incorrects": [" (A)"],
            "text_correct": "\n\nHuman: Say hello.\n\nAssistant: Hello: how are you?",
            "text_incorrect": "\n\nHuman: Say hello.\n\nAssistant: No.",
        },
    ],
    ids=[
        "explicit",
        "implicit",
        "plain",
        "prompt repeated",
        "prompt as text beside",
        "hh-rlhf",
        "hh-rlhf prompt, completion beside",
        "hh-rlhf prompt that ends with the user",
        "hh-rlhf prompt, messages beside",
        "hh-rlhf conversation, prompt as text beside",
        "hh-rlhf conversation, prompt repeated",
        "hh-rlhf turn alone",
        "the paper's comparisons",
    ],
)
def test_every_format_gives_the_same_pair(tmp_path: Path, row: dict[str, Any]) -> None:
    pair = one(write(tmp_path / "pairs.jsonl", row))
    assert pair.prompt == (Message("user", "Say hello."),)
    assert pair.chosen == (Message("assistant", "Hello: how are you?"),)
    assert pair.rejected == (Message("assistant", "No."),)
    assert (pair.probability, pair.source) == (1.0, "human")
    reference = one(write(tmp_path / "reference.jsonl", {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}))
    assert pair.id == reference.id


def test_gzip_and_parquet_hold_the_same_rows_as_jsonl(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": [USER], "chosen": [GOOD], "rejected": [{**BAD, "content": f"No {n}."}]} for n in range(3)]
    plain = read_pairs(write(tmp_path / "a.jsonl", *rows))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "c.parquet"))
    assert len(plain) == 3
    assert read_pairs(PairSource(path=str(tmp_path / "b.jsonl.gz"))) == plain
    assert read_pairs(PairSource(path=str(tmp_path / "c.parquet"))) == plain


def test_pairs_written_by_a_stage_are_read_back_unchanged(tmp_path: Path) -> None:
    pair = one(
        write(tmp_path / "in.jsonl", {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "probability": 0.75})
    )
    assert pair.probability == 0.75
    write_rows(tmp_path / "out.jsonl", [pair])
    assert read_pairs(PairSource(path=str(tmp_path / "out.jsonl"))) == [pair]


def test_unusable_pairs_are_left_out_and_counted(tmp_path: Path) -> None:
    good = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}
    source = write(
        tmp_path / "pairs.jsonl",
        good,
        good,
        {"chosen": [USER, GOOD], "rejected": [{**USER, "content": "Another prompt."}, BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, GOOD]},
        {"chosen": [USER, {**GOOD, "content": " "}], "rejected": [USER, BAD]},
        {"chosen": [USER, USER], "rejected": [USER, BAD]},
    )
    counts: Counter[str] = Counter()
    assert len(read_pairs(source, Intake(counts))) == 1
    assert counts == {
        "pairs_repeated": 1,
        "pairs_with_different_contexts": 1,
        "pairs_with_equal_completions": 1,
        "pairs_with_empty_completion": 1,
        "pairs_with_odd_turns": 1,
    }


def test_a_limit_draws_from_all_of_a_file_and_keeps_its_order(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{n:03d}", "chosen": "a", "rejected": "b"} for n in range(400)]
    source = write(tmp_path / "pairs.jsonl", *rows)
    some = source.model_copy(update={"limit": 100})
    drawn = [pair.prompt[0].content for pair in read_pairs(some)]
    assert len(drawn) == 100 and drawn == sorted(drawn)
    # Of 100 rows drawn from 400, each quarter of the file has 25, give or take 4 standard deviations of 3.8.
    assert all(10 <= sum(first <= int(name[1:]) < first + 100 for name in drawn) <= 40 for first in (0, 100, 200, 300))
    assert [row.prompt[0].content for row in read_demonstrations(some)] == drawn


def test_the_completion_column_of_a_transcript_may_hold_several_turns(tmp_path: Path) -> None:
    prompt = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    row = {"prompt": prompt, "chosen": " d\n\nHuman: e\n\nAssistant: f", "rejected": " d\n\nHuman: e\n\nAssistant: g"}
    pair = one(write(tmp_path / "pairs.jsonl", row))
    assert [message.content for message in pair.prompt] == ["a", "b", "c", "d", "e"]
    assert (pair.chosen[0].content, pair.rejected[0].content) == ("f", "g")


def test_white_space_around_the_prompt_does_not_make_it_appear_twice(tmp_path: Path) -> None:
    whole = "\n\nHuman: Say hello.\n\nAssistant: "
    row = {"prompt": [{**USER, "content": "Say hello.\n"}], "chosen": whole + "Hello.", "rejected": whole + "No."}
    assert one(write(tmp_path / "pairs.jsonl", row)).prompt == (Message("user", "Say hello."),)


def test_transcript_keeps_markers_inside_a_turn() -> None:
    text = "\n\nHuman: a: b\nHuman: quoted\n\nAssistant: c: d\n\nHuman: e\n\nAssistant: f"
    assert parse_transcript(text, "here") == (
        Message("user", "a: b\nHuman: quoted"),
        Message("assistant", "c: d"),
        Message("user", "e"),
        Message("assistant", "f"),
    )


def test_consecutive_prompt_turns_of_the_same_role_are_merged(tmp_path: Path) -> None:
    prompt = "\n\nHuman: a\n\nHuman: b\n\nAssistant: "
    pair = one(write(tmp_path / "pairs.jsonl", {"chosen": prompt + "yes", "rejected": prompt + "no"}))
    assert pair.prompt == (Message("user", "a\n\nb"),)


def test_a_file_without_a_usable_row_is_an_error_with_the_reasons(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no usable row .1 pairs_with_odd_turns"):
        read_pairs(write(tmp_path / "pairs.jsonl", {"chosen": [USER, GOOD, BAD], "rejected": [USER, GOOD, GOOD]}))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "winner": "a"}, "no column `chosen`, `rejected`; the row's columns are prompt, winner"),
        ({"chosen": "a", "rejected": "b"}, "no column `prompt`; the row's columns are chosen, rejected"),
        ({"prompt": "p", "chosen": 3, "rejected": "b"}, "`chosen` must be a text or a list"),
        ({"prompt": "p", "chosen": [{"role": "assistant"}], "rejected": "b"}, "`chosen` must be a text or a list"),
        ({"chosen": "Human: a", "rejected": "Human: b"}, "no column `prompt`"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "probability": 0.2}, r"must lie in \[0.5, 1\], got 0.2"),
    ],
)
def test_the_error_names_the_bad_row(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    fine = {"prompt": "p", "chosen": "a", "rejected": "b"}
    with pytest.raises(InputError, match=message) as error:
        read_pairs(write(tmp_path / "pairs.jsonl", fine, row))
    assert "pairs.jsonl, line 2:" in str(error.value)


def test_a_malformed_line_is_named_by_number(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n{"prompt": \n')
    with pytest.raises(InputError, match="line 2: not JSON"):
        read_pairs(PairSource(path=str(path)))


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.jsonl.gz"])
def test_an_empty_file_is_an_error(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(b"\n") if name.endswith("gz") else b"\n")
    with pytest.raises(InputError, match="no rows in it"):
        read_pairs(PairSource(path=str(path)))


def test_missing_damaged_and_unsupported_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_pairs(PairSource(path=str(tmp_path / "none.jsonl")))
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(b'{"prompt": "p", "chosen": "a", "rejected": "b"}\n' * 100)[:40])
    with pytest.raises(InputError, match="damaged or incomplete"):
        read_pairs(PairSource(path=str(cut)))
    (tmp_path / "fake.parquet").write_bytes(b"hello")
    with pytest.raises(InputError, match="not a complete parquet file"):
        read_pairs(PairSource(path=str(tmp_path / "fake.parquet")))
    (tmp_path / "pairs.docx").write_text("chosen,rejected\n")
    with pytest.raises(InputError, match="cannot read this kind of file"):
        read_pairs(PairSource(path=str(tmp_path / "pairs.docx")))


def test_a_hub_id_while_offline_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        InputError, match=r"nobody/no-such-pairs: .*HF_HUB_OFFLINE is set: unset it, or give a local file"
    ):
        read_pairs(PairSource(path="nobody/no-such-pairs"))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "completion": [GOOD]},
        {"prompt": USER["content"], "completion": GOOD["content"]},
        {"messages": [USER, GOOD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "\n\nHuman: Say hello.\n\nAssistant:", "completion": " Hello: how are you?"},
        {"prompt": "Say hello.", "completion": "\n\nHuman: Say hello.\n\nAssistant: Hello: how are you?"},
    ],
    ids=["conversational", "plain", "messages", "pairs", "hh-rlhf prompt", "hh-rlhf conversation"],
)
def test_demonstrations_of_every_format(tmp_path: Path, row: dict[str, Any]) -> None:
    counts: Counter[str] = Counter()
    source = write(tmp_path / "rows.jsonl", row, row, {"prompt": "p", "completion": " "}, {"messages": [GOOD]})
    (demonstration,) = read_demonstrations(source, Intake(counts))
    assert demonstration.prompt == (Message("user", "Say hello."),)
    assert demonstration.completion == "Hello: how are you?"
    assert counts["demonstrations_repeated"] == counts["demonstrations_empty"] == 1
    assert counts["demonstrations_with_odd_turns"] == 1


def test_the_error_about_a_missing_completion_column_lists_the_row_s_columns(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no column `completion`; the row's columns are prompt, text"):
        read_demonstrations(write(tmp_path / "rows.jsonl", {"prompt": "p", "text": "t"}))


@pytest.mark.skipif(not HH_RLHF.exists(), reason="hh-rlhf is not in shared/data")
def test_of_hh_rlhf_only_five_pairs_with_different_contexts_and_two_empty_ones_are_left_out() -> None:
    counts: Counter[str] = Counter()
    pairs = read_pairs(PairSource(path=str(HH_RLHF)), Intake(counts))
    assert counts == {"pairs_with_different_contexts": 5, "pairs_with_empty_completion": 2}
    assert len(pairs) == 1769 - 7
    assert {pair.prompt[0].role for pair in pairs} == {"user"}
    multi_turn = [pair for pair in pairs if len(pair.prompt) > 1]
    assert len(multi_turn) > len(pairs) / 2
    for pair in pairs:
        roles = [message.role for message in (*pair.prompt, *pair.chosen)]
        assert all(one != other for one, other in pairwise(roles))


@pytest.mark.skipif(not HHH.exists(), reason="the paper's comparisons are not in shared/data")
def test_every_one_of_the_paper_s_comparisons_is_a_pair() -> None:
    pairs = read_pairs(PairSource(path=str(HHH)))
    assert (len(pairs), len({pair.prompt for pair in pairs})) == (219, 127)


def test_the_folder_and_split_of_a_hub_dataset_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls: list[Any] = []

    def load_dataset(path: str, **options: Any) -> list[dict[str, str]]:
        calls.append((path, options))
        return [{"prompt": "p", "chosen": "a", "rejected": "b"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = PairSource(path="somebody/pairs", hub_folder="helpful-base", hub_split="test", name="helpful")
    assert one(source).source == "helpful"
    assert calls == [("somebody/pairs", {"data_dir": "helpful-base", "split": "test"})]
