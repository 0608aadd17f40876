"""Prompts are read from every supported format, without repeats, and their splits are stable."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.data.prompts import draw_prompts, read_prompts, split_of, split_problems, with_split
from align.errors import InputError
from align.records import SPLITS, Prompt
from align.settings.data import PromptsBlock, PromptSource, SplitBlock

HH = Path(__file__).parents[4] / "shared" / "data" / "hh-rlhf" / "harmless-base.jsonl.gz"
TALK = [
    {"role": "user", "content": "Hi: there"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "How are you?"},
    {"role": "assistant", "content": "Fine."},
]


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path, split: SplitBlock | None = None, **source: Any) -> list[Prompt]:
    block = PromptsBlock(sources=(PromptSource(path=str(path), **source),), split=split or SplitBlock())
    return read_prompts(block)


def conversation(prompt: Prompt) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in prompt.prompt]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Hi"}, [("user", "Hi")]),
        ({"prompt": TALK[:3]}, [("user", "Hi: there"), ("assistant", "Hello."), ("user", "How are you?")]),
        ({"messages": TALK}, [("user", "Hi: there"), ("assistant", "Hello."), ("user", "How are you?")]),
        ({"question": "Why?", "answer": "So."}, [("user", "Why?")]),
        ({"instruction": "Sum up.", "input": "A text.", "output": "x"}, [("user", "Sum up.\n\nA text.")]),
        ({"instruction": "Sing.", "input": ""}, [("user", "Sing.")]),
        (
            {"chosen": "\n\nHuman: Hi: there\n\nAssistant: Hello.\n\nHuman: How?\n\nAssistant: Fine.", "rejected": "x"},
            [("user", "Hi: there"), ("assistant", "Hello."), ("user", "How?")],
        ),
        (
            {"chosen": TALK, "rejected": TALK},
            [("user", "Hi: there"), ("assistant", "Hello."), ("user", "How are you?")],
        ),
        ({"prompt": "\n\nHuman: Hi\n\nAssistant:"}, [("user", "Hi")]),
        (
            {"chosen": "\n\nHuman: One.\n\nHuman: Two.\n\nAssistant: a\n\nAssistant: b"},
            [("user", "One.\n\nTwo.")],
        ),
    ],
)
def test_every_format_gives_its_prompt(tmp_path: Path, row: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    [prompt] = read(write(tmp_path / "p.jsonl", row))

    assert conversation(prompt) == expected


def test_a_column_that_the_source_names_takes_precedence(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "no", "goal": "yes"})

    assert conversation(read(path, column="goal")[0]) == [("user", "yes")]


def test_gzip_and_parquet_give_the_same_prompts_as_jsonl(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"messages": TALK, "category": "talk"}, {"messages": TALK[:1], "category": None}]
    plain = write(tmp_path / "p.jsonl", *rows)
    with gzip.open(tmp_path / "p.jsonl.gz", "wt") as out:
        out.write(plain.read_text())
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")

    found = [[(p.id, p.prompt, p.split, p.category) for p in read(path)] for path in sorted(tmp_path.iterdir())]
    assert len(found) == 3
    assert found[0] == found[1] == found[2]


def test_ids_come_from_the_content_and_repeats_are_dropped(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "a", "category": "x"}, {"question": "a"}, {"prompt": "b"})
    prompts = read(path)

    assert [(each.prompt[0].content, each.category) for each in prompts] == [("a", "x"), ("b", "")]
    assert len({each.id for each in prompts}) == 2


def test_rows_without_a_category_get_the_source_s(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "a", "category": "x"}, {"prompt": "b"})

    assert [each.category for each in read(path, category="mine")] == ["x", "mine"]


def test_a_limit_draws_the_same_prompts_in_any_order(tmp_path: Path) -> None:
    rows = [{"prompt": str(number)} for number in range(90)]
    forwards, backwards = write(tmp_path / "a.jsonl", *rows), write(tmp_path / "b.jsonl", *rows[::-1])
    drawn = {each.id for each in read(forwards, limit=20)}

    assert len(drawn) == 20
    assert {each.id for each in read(backwards, limit=20)} == drawn < {each.id for each in read(forwards, limit=30)}


def test_prompts_are_drawn_by_their_ids_in_their_own_order(tmp_path: Path) -> None:
    prompts = read(write(tmp_path / "p.jsonl", *({"prompt": str(number)} for number in range(90))))
    some = draw_prompts(prompts, 30, "a purpose")

    assert some == [each for each in prompts if each in some] and len(some) == 30
    assert {each.id for each in draw_prompts(prompts[::-1], 30, "a purpose")} == {each.id for each in some}
    assert draw_prompts(prompts, 30, "another") != some
    assert draw_prompts(prompts, None, "a purpose") == prompts


def test_splits_are_disjoint_and_near_their_shares(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", *({"prompt": f"number {number}"} for number in range(4000)))
    prompts = read(path)

    counted = Counter(each.split for each in prompts)
    assert sum(counted.values()) == 4000
    for split in SPLITS:
        share = getattr(SplitBlock(), split)
        # Four standard deviations of a binomial count.
        assert abs(counted[split] - 4000 * share) < 4 * (4000 * share * (1 - share)) ** 0.5
    assert sum(len(list(with_split(prompts, [split]))) for split in SPLITS) == 4000


def test_a_prompt_s_split_does_not_depend_on_the_others(tmp_path: Path) -> None:
    rows = [{"prompt": f"number {number}"} for number in range(50)]
    all_of_them = {each.id: each.split for each in read(write(tmp_path / "a.jsonl", *rows))}
    some = {each.id: each.split for each in read(write(tmp_path / "b.jsonl", *rows[::-3]))}

    assert some.items() <= all_of_them.items()


@given(st.text(min_size=1, max_size=20))
def test_a_share_of_one_takes_everything(name: str) -> None:
    assert split_of(name, SplitBlock(sft=0, preference=0, rl=1, eval=0)) == "rl"


def test_a_row_s_own_split_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", *({"prompt": str(number), "split": "eval"} for number in range(20)))

    assert {each.split for each in read(path)} == {"eval"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "label": 1}, r"p\.jsonl, line 1: no column with a prompt .* the row's columns are text, label"),
        ({"prompt": "  "}, "line 1: the prompt is empty"),
        ({"prompt": 3}, "line 1: `prompt` must be a text or a list"),
        ({"prompt": [{"role": "user"}]}, "line 1: `prompt` must be a text or a list"),
        ({"messages": [TALK[1]]}, "the prompt is empty"),
    ],
)
def test_the_error_names_the_bad_row(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(write(tmp_path / "p.jsonl", row))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "The answer is four.", "rejected": "No"}, "`chosen` is an answer without its prompt"),
        (
            {"prompt": [{"role": 5, "content": "x"}, TALK[0]]},
            "has the role 5; use one of system, developer, user",
        ),
        ({"prompt": [{"role": "usr", "content": "x"}]}, "has the role 'usr'"),
    ],
)
def test_ambiguous_rows_are_refused(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=rf"prompts.jsonl, line 1: .*{message}"):
        read(write(tmp_path / "prompts.jsonl", row))


def test_a_byte_order_mark_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"prompt": "Hi"}).encode())
    assert conversation(read(path)[0]) == [("user", "Hi")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "a \\ud800"}', "line 2: JSON that cannot be read"),
        (b'{"prompt": ' + b"[" * 100_000, "line 2: JSON that cannot be read .nested too deep"),
        (b'{"prompt": "b"', "line 2: not JSON .* column 15"),
        ("{'prompt': 'ü'}".encode("latin-1"), "not UTF-8 text .*; save it as UTF-8"),
    ],
)
def test_the_error_names_a_line_that_cannot_be_read(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n' + line + b"\n")
    with pytest.raises(InputError, match=message):
        read(path)


def test_the_error_names_a_missing_column(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected `goal`\); the row's columns are prompt"):
        read(write(tmp_path / "p.jsonl", {"prompt": "a"}), column="goal")


def test_a_malformed_line_is_named_by_number(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"prompt" "b"}\n')

    with pytest.raises(InputError, match=r"p\.jsonl, line 3: not JSON \(Expecting ':' delimiter at column 11\)"):
        read(path)


def test_files_without_rows_and_missing_files_are_errors(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match=r"empty\.jsonl: no rows in it"):
        read(tmp_path / "empty.jsonl")
    with pytest.raises(InputError, match=r"none\.jsonl: no such file"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="cannot read this kind of file"):
        read(write(tmp_path / "p.docx"))


def test_a_hub_id_while_offline_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))

    with pytest.raises(InputError, match=r"nobody/nothing: not a local file.*HF_HUB_OFFLINE is set"):
        read(Path("nobody/nothing"))


def test_shares_must_add_up_to_one() -> None:
    assert split_problems(SplitBlock()) == []
    assert split_problems(SplitBlock(sft=0.5)) == [
        "prompts.split: the shares of sft, preference, rl, eval add up to 1.2; make them add up to 1"
    ]
    with pytest.raises(InputError, match=r"add up to 1\.2"):
        read_prompts(PromptsBlock(sources=(PromptSource(path="x.jsonl"),), split=SplitBlock(sft=0.5)))


@pytest.mark.skipif(not HH.exists(), reason="hh-rlhf is not in shared/data")
def test_hh_rlhf_keeps_whole_conversations() -> None:
    prompts = read(HH)
    with gzip.open(HH, "rt") as lines:
        texts = [json.loads(line)["chosen"] for line in lines]

    by_text = {
        "".join(f"\n\n{'Human' if m.role == 'user' else 'Assistant'}: {m.content}" for m in p.prompt) for p in prompts
    }
    whole = [text for text in texts if text[: text.rindex("\n\nAssistant:")].rstrip() in by_text]
    assert len(whole) > 0.97 * len(texts)
    assert sum(len(prompt.prompt) > 1 for prompt in prompts) > 0.7 * len(prompts)
    assert all(prompt.prompt[-1].role == "user" for prompt in prompts)
