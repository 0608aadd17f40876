"""Each request is answered once, and neither a kill nor the number of processes changes the answers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.engines.complete_all import complete_all, score_all
from align.engines.engine import ChoiceRequest, ChoiceScores, Completed, Request, no_progress
from align.errors import AlignError
from align.records import Message
from align.run.progress import RowBar
from tests.unit.feedback.engines import Engine


def request(name: str, text: str = "hi") -> Request:
    return Request(name, (Message("user", text),), seed=len(text), max_new_tokens=5)


def batch_dependent(engine: Engine) -> None:
    """Make each answer name the requests of its batch, as a real engine's last bits depend on them."""
    engine.answer = lambda request: ",".join(engine.batches[-1])


REQUESTS = [request(f"r{number}", "x" * (number * 7 % 5)) for number in range(11)]


def undisturbed(tmp_path: Path) -> dict[str, Completed]:
    engine = Engine()
    batch_dependent(engine)
    return complete_all(engine, REQUESTS, 3, tmp_path / "undisturbed.journal", "test")


def test_answers_come_in_the_order_of_the_requests(tmp_path: Path) -> None:
    done = undisturbed(tmp_path)

    assert list(done) == [each.id for each in REQUESTS]
    assert all(row.id == key for key, row in done.items())


def test_a_chunk_holds_requests_of_like_length(tmp_path: Path) -> None:
    engine = Engine(lambda request: "")
    complete_all(engine, REQUESTS, 3, tmp_path / "j", "test")

    lengths = {each.id: len(each.messages[0].content) for each in REQUESTS}
    flat = [lengths[name] for batch in engine.batches for name in batch]
    assert flat == sorted(flat, reverse=True)


@settings(deadline=None)
@given(deaths=st.lists(st.integers(0, 8), max_size=5))
def test_killed_anywhere_and_resumed_equals_undisturbed(
    tmp_path_factory: pytest.TempPathFactory, deaths: list[int]
) -> None:
    tmp_path = tmp_path_factory.mktemp("kill")
    for death in deaths:
        engine = Engine(dies_after=death)
        batch_dependent(engine)
        try:
            complete_all(engine, REQUESTS, 3, tmp_path / "j", "test")
        except KeyboardInterrupt:
            continue
    engine = Engine()
    batch_dependent(engine)

    assert complete_all(engine, REQUESTS, 3, tmp_path / "j", "test") == undisturbed(tmp_path)
    lines = [json.loads(line) for part in tmp_path.glob("j.*") for line in part.read_text().splitlines()]
    assert len(lines) == len({line["id"] for line in lines}) == len(REQUESTS)


def test_the_row_of_a_torn_journal_line_is_regenerated(tmp_path: Path) -> None:
    undisturbed(tmp_path)
    journal = tmp_path / "undisturbed.journal.0"
    journal.write_bytes(journal.read_bytes()[:-9])

    assert undisturbed(tmp_path) == undisturbed(tmp_path)
    assert len(journal.read_text().splitlines()) == len(REQUESTS)


def test_an_engine_with_independent_rows_gets_no_request_twice(tmp_path: Path) -> None:
    sent: list[str] = []
    for death in (4, 99):
        engine = Engine(lambda request: request.id, dies_after=death)
        engine.depends_on_batch = False
        try:
            done = complete_all(engine, REQUESTS, 3, tmp_path / "j", "test")
        except KeyboardInterrupt:
            assert death == 4
        sent += [each.id for each in engine.requests]

    assert sorted(sent) == sorted(each.id for each in REQUESTS)
    assert {key: row.text for key, row in done.items()} == {name: name for name in done}


def test_the_bar_follows_the_progress_that_an_engine_reports_within_a_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Reporting(Engine):
        def complete(self, requests, progress=no_progress, at_once=None):  # type: ignore[no-untyped-def]
            for share in (0.25, 0.5, 1.0):
                progress(share)
            yield from super().complete(requests)

    reached: list[float] = []
    monkeypatch.setattr(RowBar, "_reach", lambda self, rows: reached.append(rows))
    complete_all(Reporting(), REQUESTS[:8], 4, tmp_path / "j", "test")

    assert reached == [0, 1, 2, 4, 1, 2, 3, 4, 4, 5, 6, 8, 5, 6, 7, 8]


def test_finished_chunks_are_not_regenerated(tmp_path: Path) -> None:
    complete_all(Engine(), REQUESTS, 3, tmp_path / "j", "test")
    again = Engine()
    complete_all(again, REQUESTS, 3, tmp_path / "j", "test")

    assert again.batches == []


def test_two_processes_share_the_chunks_and_give_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align.run.processes.barrier", lambda: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    engines = []
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        engine = Engine()
        batch_dependent(engine)
        engines.append(engine)
        try:
            done = complete_all(engine, REQUESTS, 3, tmp_path / "j", "test")
        except AlignError:
            # Without a barrier in this test, the first rank does not find the other's chunks.
            assert rank == "1"
    monkeypatch.delenv("WORLD_SIZE")

    assert done == undisturbed(tmp_path)
    sent = [name for engine in engines for batch in engine.batches for name in batch]
    assert sorted(sent) == sorted(each.id for each in REQUESTS)


def test_without_a_journal_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    engine = Engine(lambda request: request.id)

    done = complete_all(engine, REQUESTS, 4, None, "test")

    assert {key: row.text for key, row in done.items()} == {each.id: each.id for each in REQUESTS}
    assert list(tmp_path.iterdir()) == []


def test_an_engine_that_leaves_requests_out_is_an_error(tmp_path: Path) -> None:
    class Lazy(Engine):
        def complete(self, requests, progress=no_progress, at_once=None):  # type: ignore[no-untyped-def]
            return list(super().complete(requests))[1:]

    with pytest.raises(AlignError, match="left 4 requests unanswered"):
        complete_all(Lazy(), REQUESTS, 3, tmp_path / "j", "test")


def test_requests_need_distinct_ids(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="same id"):
        complete_all(Engine(), [request("a"), request("a")], 3, tmp_path / "j", "test")


def test_no_requests_give_no_answers(tmp_path: Path) -> None:
    assert complete_all(Engine(), [], 3, tmp_path / "j", "test") == {}


def test_scores_are_read_back_from_the_journal_unchanged(tmp_path: Path) -> None:
    requests = [ChoiceRequest(f"c{n}", (Message("user", "?"),), ("A", "B b")) for n in range(3)]
    engine = Engine(score=lambda request, choice: float("-inf") if choice == "A" else -0.1)
    made = score_all(engine, requests, 2, tmp_path / "j", "test")
    read = score_all(Engine(dies_after=0), requests, 2, tmp_path / "j", "test")

    assert made == read
    assert read["c1"] == ChoiceScores("c1", (float("-inf"), -0.1), (1, 2))


def with_follow_up(name: str) -> Request:
    return replace(request(name), follow_up=lambda text: request(f"{name} after {text}"))


@pytest.mark.parametrize("eager", [True, False])
def test_follow_ups_get_the_answer_and_are_answered_once(tmp_path: Path, eager: bool) -> None:
    class Eager(Engine):
        """Answers follow-ups in the same call if `eager`."""

        depends_on_batch = eager

        def complete(self, requests, progress=no_progress, at_once=None):  # type: ignore[no-untyped-def]
            for each in requests:
                (done,) = super().complete([each])
                yield done
                if eager and each.follow_up:
                    yield from super().complete([each.follow_up(done.text)])

    requests = [with_follow_up(f"r{number}") for number in range(5)]
    engine = Eager()
    done = complete_all(engine, requests, 2, tmp_path / "j", "test")
    first = {each.id for each in requests}
    assert {*done} == first | {each.follow_up(done[each.id].text).id for each in requests if each.follow_up}
    assert complete_all(Eager(dies_after=0), requests, 2, tmp_path / "j", "test") == done
    assert complete_all(Eager(), requests, 2, None, "test") == done


def test_a_chunk_whose_follow_up_is_missing_is_regenerated_whole(tmp_path: Path) -> None:
    requests = [with_follow_up(f"r{number}") for number in range(4)]
    complete_all(Engine(), [replace(each, follow_up=None) for each in requests], 2, tmp_path / "j", "test")
    engine = Engine()
    complete_all(engine, requests, 2, tmp_path / "j", "test")
    assert [len(batch) for batch in engine.batches] == [2, 2, 2, 2], "the first turns again, then their follow-ups"


def test_a_server_gets_all_missing_requests_in_one_call(tmp_path: Path) -> None:
    engine = Engine()
    engine.depends_on_batch = False
    complete_all(engine, REQUESTS[:5], 2, tmp_path / "j", "test")
    complete_all(engine, REQUESTS, 2, tmp_path / "j", "test")

    first, rest = map(set, engine.batches)
    assert first == {each.id for each in REQUESTS[:5]}
    assert rest == {each.id for each in REQUESTS[5:]}


@pytest.mark.parametrize(("count", "sizes"), [(11, [2, 2, 2, 2, 2, 1]), (16, [4] * 4), (90, [16] * 5 + [10])])
def test_a_chunk_is_several_batches_long_if_there_are_enough_requests(
    tmp_path: Path, count: int, sizes: list[int]
) -> None:
    engine = Engine()
    complete_all(engine, [request(f"r{number}") for number in range(count)], 2, tmp_path / "j", "test")

    assert [len(batch) for batch in engine.batches] == sizes


def test_the_batch_size_bounds_the_rows_of_an_engine(tmp_path: Path) -> None:
    class Bounded(Engine):
        def complete(self, requests, progress=no_progress, at_once=None):  # type: ignore[no-untyped-def]
            bounds.append(at_once)
            return super().complete(requests)

    bounds: list[int] = []
    complete_all(Bounded(), REQUESTS, 6, tmp_path / "j", "test")
    assert bounds == [6, 6]


def test_choices_with_a_common_prefix_are_scored_together(tmp_path: Path) -> None:
    texts = {f"{pair}{principle}": f"{'long ' * pair}{principle}" for pair in range(3) for principle in "xyz"}
    engine = Engine()
    requests = [ChoiceRequest(name, (Message("user", text),), ("A", "B")) for name, text in sorted(texts.items())]
    score_all(engine, requests[::-1], 3, tmp_path / "j", "test")

    assert [len({name[0] for name in batch}) for batch in engine.batches] == [1, 1, 1]


def test_what_follows_a_refused_turn_is_refused_too_and_not_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Strict(Engine):
        depends_on_batch = False

        def complete(self, requests, progress=no_progress, at_once=None):  # type: ignore[no-untyped-def]
            self.batches.append([each.id for each in requests])
            for each in requests:
                why = "filtered" if each.id == "r1" else ""
                yield Completed(each.id, "" if why else "yes", "stop", 1, refused=why)

    requests = [with_follow_up(f"r{number}") for number in range(3)]
    engine = Strict()
    done = complete_all(engine, requests, 2, tmp_path / "j", "test")
    assert {key for key, each in done.items() if each.refused} == {"r1", "r1 after "}
    assert engine.batches == [["r0", "r1", "r2"], ["r0 after yes", "r2 after yes"]]
    assert "refused 2 of 6" in capsys.readouterr().err
    assert complete_all(Strict(), requests, 2, tmp_path / "j", "test") == done
