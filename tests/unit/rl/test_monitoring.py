"""What the terminal shows of a run, and that no text in it can control the terminal."""

import json

import pytest

from align.rl.monitoring import Watch
from align.rl.settings import PpoBlock
from align.run.tracking import Tracker
from align.settings.blocks import TrackingBlock

HOSTILE = "fine \x1b[31mred\x1b]0;title\x07 \x9b2J [bold]not bold[/bold] [/nothing] \u202ebackwards"
KEPT_OUT = ("\x1b", "\x07", "\x9b", "\u202e")


def figures(**changes):
    plain = {"score": 0.5, "completion_length": 8.0, "completion_length_std": 1.0, "score_length_slope": 0.0}
    return plain | {"kl_to_reference_k1": 1.0, "sampling_gap": 0.0} | changes


def samples(count, **changes):
    row = {"score": 0.25, "kl_to_reference_k1": 1.5, "tokens": 7}
    return [
        row | {"prompt": [{"role": "user", "content": f"ask {number}"}], "completion": f"say {number}"} | changes
        for number in range(count)
    ]


@pytest.fixture
def watch(tmp_path):
    def build(**settings):
        tracker = Tracker(tmp_path, TrackingBlock(), "tiny", "ppo")
        watch = Watch(PpoBlock(**settings), (), tmp_path, tracker)
        watch.resume(0)
        return watch

    return build


def test_completions_and_prompts_cannot_move_the_cursor_nor_pass_for_markup(watch, capsys):
    rows = samples(1, completion=HOSTILE, prompt=[{"role": "user", "content": HOSTILE}])
    watch(sample_table_every=1).show_samples(1, rows)
    out, error = capsys.readouterr()
    assert not any(character in out + error for character in KEPT_OUT)
    words = "".join(character for character in out if character not in "│\n ")
    assert "[bold]notbold[/bold]" in words and "[/nothing]" in words


def test_a_source_named_by_a_stranger_cannot_either(watch, capsys, monkeypatch):
    monkeypatch.setattr(
        "align.rl.monitoring.fired", lambda seen: [type("Alarm", (), {"name": "x", "sentence": HOSTILE})]
    )
    watch().observe(1, figures())
    assert not any(character in "".join(capsys.readouterr()) for character in KEPT_OUT)


def test_a_few_samples_from_all_over_the_rollout_are_shown_each_so_many_iterations(watch, capsys):
    watching = watch(sample_table_every=5)
    watching.show_samples(4, samples(100))
    assert capsys.readouterr().out == ""
    watching.show_samples(10, samples(100))
    out = capsys.readouterr().out
    assert [number for number in range(100) if f"say {number} " in out] == [0, 25, 50, 75]
    assert "samples of iteration 10" in out and "0.25" in out and "1.5" in out
    watching.show_samples(15, samples(2, completion="long " * 1000))
    assert len(capsys.readouterr().out) < 5000
    watch(sample_table_every=None).show_samples(10, samples(100))
    assert capsys.readouterr().out == ""


def test_wandb_gets_the_samples_whole(watch, monkeypatch):
    tables = []
    watching = watch(sample_table_every=1)
    monkeypatch.setattr(watching.tracker, "log_table", lambda *table: tables.append(table))
    watching.show_samples(1, samples(2, completion="word " * 1000))
    [(name, columns, rows)] = tables
    assert (name, columns) == ("samples", ("prompt", "completion", "score", "KL", "tokens"))
    assert rows[1] == ("ask 1", "word " * 1000, 0.25, 1.5, 7)


def test_an_alarm_gives_a_sentence_a_row_and_a_figure_in_its_iteration_alone(watch, tmp_path, capsys):
    watching = watch(watch={"window": 2, "repeat_after": 10})
    found = [watching.observe(step, figures(sampling_gap=0.3)).figures for step in range(1, 5)]
    assert [each.get("alarm/sampling_gap") for each in found] == [None, 1.0, None, None]
    [row] = [json.loads(line) for line in (tmp_path / "alarms.jsonl").read_text().splitlines()]
    assert (row["iteration"], row["alarm"]) == (2, "sampling_gap")
    assert f"ppo, iteration 2: {row['sentence']} [sampling_gap]" in capsys.readouterr().err


def test_alarms_after_the_checkpoint_are_forgotten_on_resuming(watch, tmp_path):
    watching = watch(watch={"window": 1, "repeat_after": 1})
    for step in (1, 2, 3):
        watching.observe(step, figures(sampling_gap=0.3))
    path = tmp_path / "alarms.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines) + '{"iteration": 4, "al')
    watching.resume(2)
    assert path.read_text() == "".join(lines[:2])
