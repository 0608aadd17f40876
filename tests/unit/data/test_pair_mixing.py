"""The AI judge's pairs and human pairs are joined without repeats, and mixed by a share."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from align.data.pair_mixing import gather_pairs, mix_sizes, pairs_by_source
from align.data.pairs import read_pairs
from align.data.sources import Intake
from align.errors import InputError
from align.records import write_rows
from align.run.artefacts import Manifest, write_json
from tests.unit.data.pair_files import one, write


def test_gathered_pairs_are_the_judge_s_and_then_the_human_ones_without_repeats(tmp_path: Path) -> None:
    ai = one(write(tmp_path / "ai.jsonl", {"prompt": "p", "chosen": "a", "rejected": "b", "probability": 0.8}))
    write_rows(tmp_path / "pairs.jsonl", [ai])
    human = write(
        tmp_path / "human.jsonl",
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
    )
    counts: Counter[str] = Counter()
    pairs = gather_pairs(tmp_path / "pairs.jsonl", [human], Intake(counts))
    assert [pair.prompt[0].content for pair in pairs] == ["p", "q"]
    assert pairs[0] == ai
    assert (counts["pairs_ai"], counts["pairs_human"], counts["pairs_repeated"]) == (1, 2, 1)
    assert len(gather_pairs(None, [human], Intake())) == 2


def test_having_no_pair_at_all_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").touch()
    with pytest.raises(InputError, match="no pair to train on"):
        gather_pairs(tmp_path / "pairs.jsonl", [], Intake())


def test_the_error_about_missing_pairs_gives_reasons_from_the_judge_s_manifest_and_remedies(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").touch()
    counts = {"comparisons": 3, "undecided: cut": 1, "undecided: tie": 2, "pairs": 0}
    write_json(tmp_path / "manifest.json", Manifest("compare", "f", {}, {}, {}, counts).__dict__)
    with pytest.raises(InputError) as raised:
        gather_pairs(tmp_path / "pairs.jsonl", [], Intake())
    assert "undecided comparisons: 2 tie, 1 cut)" in str(raised.value)
    assert "raise `compare.sampling.max_new_tokens`" in str(raised.value)


@pytest.mark.parametrize("share", [0.1, 0.43, 0.5, 0.9])
@pytest.mark.parametrize(("ai", "human"), [(100, 1000), (1000, 100), (300, 300)])
def test_a_mix_has_the_share_and_leaves_out_pairs_of_one_side_only(share: float, ai: int, human: int) -> None:
    some_ai, some_human = mix_sizes(ai, human, share)
    assert some_human / (some_ai + some_human) == pytest.approx(share, abs=0.01)
    assert some_ai == ai or some_human == human
    assert some_ai <= ai and some_human <= human


def test_a_larger_human_share_extends_the_selection_of_a_smaller_one(tmp_path: Path) -> None:
    rows = [{"prompt": f"ai {n}", "chosen": "a", "rejected": "b", "probability": 0.8} for n in range(20)]
    labelled = [replace(pair, source="ai") for pair in read_pairs(write(tmp_path / "ai.jsonl", *rows))]
    write_rows(tmp_path / "pairs.jsonl", labelled)
    rows = [{"prompt": f"human {n}", "chosen": "a", "rejected": "b"} for n in range(100)]
    human = write(tmp_path / "human.jsonl", *rows).model_copy(update={"name": "helpful"})
    counts: Counter[str] = Counter()
    quarter = gather_pairs(tmp_path / "pairs.jsonl", [human], Intake(counts), 0.25)
    assert pairs_by_source(quarter) == {"ai": 20, "helpful": 7}
    assert (counts["pairs_ai_left_out"], counts["pairs_human_left_out"]) == (0, 93)
    half = gather_pairs(tmp_path / "pairs.jsonl", [human], Intake(), 0.5)
    assert pairs_by_source(half) == {"ai": 20, "helpful": 20}
    assert {pair.id for pair in quarter} < {pair.id for pair in half}
    most = gather_pairs(tmp_path / "pairs.jsonl", [human], Intake(), 0.9)
    assert pairs_by_source(most) == {"ai": 11, "helpful": 100}
    assert pairs_by_source(gather_pairs(tmp_path / "pairs.jsonl", [human], Intake())) == {"ai": 20, "helpful": 100}
