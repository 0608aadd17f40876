"""A bar moves with every part of the work and every row, never backwards, and ends full."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.run.progress import RowBar


@given(st.lists(st.lists(st.floats(0, 1), max_size=5), min_size=1, max_size=4), st.integers(1, 6), st.integers(0, 9))
def test_parts_and_rows_only_ever_move_it_forwards(parts: list[list[float]], rows: int, done: int) -> None:
    reached = [float(done)]
    with RowBar(done + rows * len(parts), done, "test") as bar:
        for shares in parts:
            bar.begin(rows)
            for share in shares:
                bar.part(share)
                reached.append(bar.reached)
            for _ in range(rows):
                bar.row()
                reached.append(bar.reached)
        assert bar.reached == done + rows * len(parts)
    assert reached == sorted(reached)


def test_it_shows_rows_and_the_time_left(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align.run.progress._SECONDS_BETWEEN", {True: 0, False: 0})
    with RowBar(46, 0, "base answers") as bar:
        bar.begin(46)
        bar.part(0.5)
    shown = capsys.readouterr().err.rpartition("\r")[2]
    assert shown.startswith("base answers:  50%|") and "| 23/46 [" in shown and "<00:00]" in shown


def test_only_the_first_process_has_one(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with RowBar(4, 0, "answers") as bar:
        bar.begin(4)
        bar.row()
    assert capsys.readouterr().err == ""
