"""The metrics file as a reader finds it, and wandb as a guest that cannot disturb."""

import json
import sys
import types
import warnings
from pathlib import Path

import pytest

from align.run.tracking import Tracker, flatten_figures, truncate_rows, wandb_mode
from align.settings.blocks import TrackingBlock


def rows(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def tracker(directory: Path, wandb: bool = False) -> Tracker:
    return Tracker(directory, TrackingBlock(wandb=wandb), "quickstart/style-1234", "ppo")


@pytest.fixture
def no_login(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("align.run.tracking._is_reachable", lambda host: True)
    return tmp_path / "netrc"


@pytest.fixture
def fake_wandb(monkeypatch, no_login):
    """A wandb module that records its calls."""
    calls: list[tuple] = []

    class Run:
        def log(self, figures, step=None, commit=None):
            calls.append(("log", figures, step))

        def finish(self, exit_code=None):
            calls.append(("finish", exit_code))

    module = types.ModuleType("wandb")
    module.Settings = lambda **settings: settings
    module.Table = lambda columns, data: (columns, data)
    module.init = lambda **settings: calls.append(("init", settings)) or Run()
    module.calls = calls
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_each_row_is_on_disk_before_log_returns(tmp_path):
    log = tracker(tmp_path)
    log.log(1, {"loss": 0.5})
    assert rows(tmp_path) == [{"step": 1, "loss": 0.5}]
    log.close()


def test_figures_that_are_not_finite_are_null_and_the_line_is_strict_json(tmp_path):
    with tracker(tmp_path) as log:
        log.log(1, {"nan": float("nan"), "inf": float("-inf"), "count": 3})
    assert rows(tmp_path) == [{"step": 1, "nan": None, "inf": None, "count": 3}]


def test_truncate_lets_a_resumed_stage_log_its_steps_again_without_doubling(tmp_path):
    with tracker(tmp_path) as log:
        for step in range(1, 6):
            log.log(step, {"loss": 1.0})
    with tracker(tmp_path) as log:
        log.truncate(3)
        log.log(4, {"loss": 2.0})
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]


def test_rows_are_truncated_at_newlines_alone_whatever_their_texts_hold(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"iteration": n, "text": "a\u2028b\x85c"}, ensure_ascii=False) + "\n" for n in (1, 2, 3)]
    path.write_bytes("".join(lines).encode() + '{"iteration": 2, "text": "é'.encode()[:-1])
    truncate_rows(path, "iteration", 2)
    assert path.read_bytes() == "".join(lines[:2]).encode()
    truncate_rows(tmp_path / "missing.jsonl", "iteration", 2)


def test_a_row_that_a_kill_cut_short_is_dropped_on_opening(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    with tracker(tmp_path) as log:
        log.log(2, {"loss": 2.0})
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]


def test_other_processes_than_the_first_write_nothing(tmp_path, monkeypatch, fake_wandb):
    monkeypatch.setenv("RANK", "1")
    with tracker(tmp_path / "stage", wandb=True) as log:
        log.log(1, {"loss": 1.0})
        log.truncate(0)
        log.log_table("completions", ["text"], [["hello"]])
    assert not (tmp_path / "stage").exists()
    assert fake_wandb.calls == []


def test_wandb_gets_one_run_a_stage_grouped_by_the_recipes_run(tmp_path, fake_wandb):
    with tracker(tmp_path / "ppo-abc", wandb=True) as log:
        log.log(4, {"loss": 1.0})
        log.log_table("completions", ["text"], [("hello",)])
    (_, settings), logged, table, finished = fake_wandb.calls
    assert (settings["group"], settings["job_type"], settings["mode"]) == ("quickstart/style-1234", "ppo", "offline")
    assert settings["dir"] == tmp_path / ".wandb"
    assert logged == ("log", {"loss": 1.0}, 4)
    assert table[1] == {"completions": (["text"], [["hello"]])}
    assert finished == ("finish", 0)


def test_a_resumed_stage_continues_its_wandb_run(tmp_path, fake_wandb):
    for _ in range(2):
        tracker(tmp_path / "ppo-abc", wandb=True).close()
    first, second = (settings["id"] for name, settings in (call for call in fake_wandb.calls if call[0] == "init"))
    assert first == second != ""


def test_an_exception_finishes_the_wandb_run_as_failed(tmp_path, fake_wandb):
    with pytest.raises(KeyError), tracker(tmp_path, wandb=True):
        raise KeyError
    assert fake_wandb.calls[-1] == ("finish", 1)


def test_a_failing_wandb_warns_once_and_logging_continues_to_the_file(tmp_path, fake_wandb):
    def fail(**settings):
        raise RuntimeError("no space on the server")

    fake_wandb.init = fail
    with pytest.warns(UserWarning, match="no space on the server"):
        log = tracker(tmp_path, wandb=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log.log(1, {"loss": 1.0})
        log.close()
    assert len(rows(tmp_path)) == 1


def test_a_wandb_that_fails_midway_is_not_called_again(tmp_path, fake_wandb):
    log = tracker(tmp_path, wandb=True)
    fake_wandb.Table = None
    with pytest.warns(UserWarning, match="wandb"):
        log.log_table("completions", ["text"], [["hello"]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log.log(1, {"loss": 1.0})
        log.close()
    assert rows(tmp_path) == [{"step": 1, "loss": 1.0}]


def test_wandb_is_not_imported_unless_asked(tmp_path, fake_wandb):
    tracker(tmp_path).close()
    assert fake_wandb.calls == []


def test_mode_is_offline_without_a_login_and_online_with_one(no_login, monkeypatch):
    assert wandb_mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert wandb_mode() == "online"


def test_mode_is_online_with_a_login_in_netrc_for_that_host(no_login, monkeypatch):
    no_login.write_text("machine api.wandb.ai login user password secret\n")
    assert wandb_mode() == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert wandb_mode() == "offline"


def test_mode_is_offline_where_the_network_does_not_answer(no_login, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert wandb_mode() == "offline"


def test_mode_that_the_user_set_is_kept(no_login, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode() == "disabled"


@pytest.mark.parametrize("chosen", ["online", "shared"])
def test_mode_that_needs_a_login_is_offline_without_one_so_that_wandb_never_prompts(no_login, monkeypatch, chosen):
    monkeypatch.setenv("WANDB_MODE", chosen)
    with pytest.warns(UserWarning, match=f"WANDB_MODE is {chosen} and there is no login.*offline.*wandb login"):
        assert wandb_mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert wandb_mode() == chosen


def test_real_wandb_offline_leaves_a_run_outside_the_stage_folder(tmp_path, no_login):
    pytest.importorskip("wandb")
    with tracker(tmp_path / ".partial" / "ppo-abc", wandb=True) as log:
        log.log(1, {"loss": 1.0, "bad": float("nan")})
    assert list((tmp_path / ".partial" / ".wandb" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert not (tmp_path / ".partial" / "ppo-abc" / "wandb").exists()


def test_nested_figures_are_logged_by_their_paths_and_numbers_alone() -> None:
    nested = {"a": 1, "judge": {"name": "rule", "right": {"x": 0.5}}, "bins": [1, 2], "none": None, "yes": True}
    assert flatten_figures(nested) == {"a": 1, "judge/right/x": 0.5, "yes": True}
