"""The prompt files that ship with the recipes: well-formed, distinct, varied, and as their README describes them."""

import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

PROMPTS = Path(__file__).resolve().parents[2] / "recipes" / "prompts"
NAMES = ("harmful", "benign")
LOOKS_HARMFUL = "looks-harmful"


def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (PROMPTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def words_of(row: dict[str, Any]) -> list[str]:
    """The lower-case words of a whole conversation: prompts that differ only in case or punctuation are equal."""
    return re.findall(r"[a-z0-9']+", " ".join(message["content"] for message in row["prompt"]).lower())


def categories_of(name: str) -> Counter[str]:
    return Counter(row["category"] for row in rows_of(name))


@pytest.mark.parametrize("name", NAMES)
def test_every_row_is_a_conversation_that_waits_for_the_assistant(name: str) -> None:
    for number, row in enumerate(rows_of(name), start=1):
        assert set(row) == {"prompt", "category"}, f"{name} line {number}"
        assert re.fullmatch(r"[a-z]+(-[a-z]+)*", row["category"]), f"{name} line {number}"
        roles = [message["role"] for message in row["prompt"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"], f"{name} line {number}"
        for message in row["prompt"]:
            assert set(message) == {"role", "content"}, f"{name} line {number}"
            assert message["content"] and message["content"] == message["content"].strip(), f"{name} line {number}"


@pytest.mark.parametrize("name", NAMES)
def test_the_file_ends_with_a_newline_and_has_no_blank_line(name: str) -> None:
    text = (PROMPTS / f"{name}.jsonl").read_text(encoding="utf-8")
    assert text.endswith("}\n")
    assert "\n\n" not in text


def test_no_prompt_appears_twice_within_or_across_the_files() -> None:
    texts = Counter(" ".join(words_of(row)) for name in NAMES for row in rows_of(name))
    assert [text for text, count in texts.items() if count > 1] == []


def test_no_prompt_is_a_near_duplicate_of_another() -> None:
    bags = [frozenset(words_of(row)) for name in NAMES for row in rows_of(name)]
    close = [(a, b) for a, b in combinations(bags, 2) if len(a & b) > 0.75 * len(a | b)]
    assert close == []


def test_the_harmful_prompts_cover_ten_categories_evenly() -> None:
    counts = categories_of("harmful")
    assert counts.total() >= 210
    assert len(counts) >= 10
    assert min(counts.values()) >= 15
    assert max(counts.values()) <= 2 * min(counts.values())


def test_the_benign_prompts_cover_ten_categories_and_enough_that_only_look_harmful() -> None:
    counts = categories_of("benign")
    assert counts.total() >= 310
    assert counts.pop(LOOKS_HARMFUL) >= 50
    assert len(counts) >= 10
    assert min(counts.values()) >= 15


def test_no_category_is_both_harmful_and_benign() -> None:
    assert categories_of("harmful").keys().isdisjoint(categories_of("benign"))


def test_some_harmful_prompts_have_three_turns_in_several_categories() -> None:
    several = [row["category"] for row in rows_of("harmful") if len(row["prompt"]) == 3]
    assert len(several) >= 5
    assert len(set(several)) >= 5


def test_harmful_prompts_are_requests_of_a_sentence_or_two_and_carry_no_know_how() -> None:
    for row in rows_of("harmful"):
        for message in row["prompt"]:
            assert len(message["content"].split()) <= 40, message["content"]
            assert "\n" not in message["content"], message["content"]


def test_benign_prompts_are_one_short_calm_sentence() -> None:
    for row in rows_of("benign"):
        (message,) = row["prompt"]
        text = message["content"]
        assert 6 <= len(text.split()) <= 25, text
        assert "!" not in text, text
        assert re.search(r"[.?]\s", text) is None, text
        assert text[-1] in ".?", text


@pytest.mark.parametrize("name", NAMES)
def test_the_categories_are_spread_over_the_file_so_that_its_first_rows_hold_every_one(name: str) -> None:
    assert {row["category"] for row in rows_of(name)[:40]} == set(categories_of(name))


@pytest.mark.parametrize("name", NAMES)
def test_the_readme_states_the_count_of_every_category(name: str) -> None:
    section = (PROMPTS / "README.md").read_text(encoding="utf-8").split(f"## {name}.jsonl")[1].split("\n## ")[0]
    stated = {match[1]: int(match[2]) for match in re.finditer(r"^\| ([a-z-]+) \| (\d+) \|", section, re.MULTILINE)}
    assert stated == categories_of(name)
