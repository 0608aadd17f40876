"""The benchmark of the critique loop on a tiny model: both sides say the same, and ours reads less."""

import cai_loop
import pytest
import torch

from align.engines.local import LocalEngine
from align.models.loading import load_causal_lm, load_tokenizer
from tests.tiny import build_tiny_model


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    build_tiny_model(folder, tie_word_embeddings=False, initializer_range=0.3, max_position_embeddings=8192)
    return load_causal_lm(str(folder), torch.float32), load_tokenizer(str(folder))


def test_greedy_texts_equal_the_plain_loops_and_what_is_known_is_read_once(parts):
    samples = cai_loop.make_samples(*parts, 16, 8)
    ours = cai_loop.run(LocalEngine(*parts, name="ours"), samples, 8, at_once=2)
    plain = cai_loop.run(cai_loop.PlainEngine(*parts), samples, 8)
    assert ours.turns == plain.turns
    assert len({text for chain in ours.turns for text in chain}) > 20, "texts are to differ"
    assert ours.read < plain.read / 2


def test_choices_by_all_principles_are_those_of_a_row_for_each(parts):
    samples = cai_loop.make_samples(*parts, 2, 8)
    revisions = ["No, I won't.", "Ask somebody else, please."]
    _, ours = cai_loop.choose(LocalEngine(*parts, name="ours"), samples, revisions)
    _, plain = cai_loop.choose(cai_loop.PlainEngine(*parts, rows=3), samples, revisions)
    principles = len(cai_loop.load_constitution(str(cai_loop.CONSTITUTION)).principles)
    assert len(ours) == 2 * principles * 2 * 2
    assert ours == pytest.approx(plain, abs=1e-3)


def test_tables_are_written_between_their_marks(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{cai_loop.MARKS[0]}\nold\n{cai_loop.MARKS[1]}\nafter\n")
    monkeypatch.setattr(cai_loop, "DOCS", page)
    cai_loop.write_down("| new |")
    assert page.read_text() == f"before\n{cai_loop.MARKS[0]}\n\n| new |\n\n{cai_loop.MARKS[1]}\nafter\n"
