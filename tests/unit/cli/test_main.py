"""The command line: what each verb does, and how it ends."""

import io
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from align.__main__ import main
from align.pipeline.recipe import load_recipe, recipe_model
from align.records import Conversation
from tests.fakes import FAKES, add_fake_stages, remove_fake_stages

CONSTITUTION = """\
title: Small
preamble: How an answer sounds.
principles:
  - id: calm
    text: Be calm [always].
    hard: true
    rule: {excludes: "!"}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    add_fake_stages()
    recipe_model.cache_clear()
    Path("recipe.yaml").write_text("letters: {}\ncapitals: {}\n")
    Path("small.yaml").write_text(CONSTITUTION)
    yield tmp_path
    remove_fake_stages()
    recipe_model.cache_clear()


def test_a_stage_runs_in_this_process(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "letters", "--recipe", "recipe.yaml", "--set", "letters.text=xy"]) == 0
    assert Path("runs/recipe/shared/letters/letters.txt").read_text() == "xy"
    assert "letters: done in 0 s (runs/recipe/shared/letters)\n  letters 2\n" in capsys.readouterr().out


def test_a_constitution_on_the_command_line_makes_a_separate_run() -> None:
    assert main(["run", "letters", "--recipe", "recipe.yaml"]) == 0
    for options in ([], ["--constitution", "small.yaml"]):
        assert main(["run", "capitals", "--recipe", "recipe.yaml", *options]) == 0
    runs = sorted(path.parent.parent.name for path in Path("runs/recipe").glob("*/capitals/capitals.txt"))
    assert len(runs) == 2
    assert runs[0] == "shared"
    assert runs[1].startswith("small-")


def test_the_plan_names_what_comes_next(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "recipe.yaml", "--set", "seed=3"]) == 0
    shown = capsys.readouterr().out
    assert "letters   missing (next)" in shown
    assert "waits for letters" in shown
    assert "Next: align run letters --recipe recipe.yaml --set seed=3" in shown


def test_bad_input_ends_with_two_and_a_message_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "gone.yaml"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("gone.yaml: no such file")
    assert "Traceback" not in said


def test_a_traceback_is_shown_when_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ALIGN_DEBUG", "1")
    assert main(["plan", "gone.yaml"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_interruption_ends_with_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "letters", "--recipe", "recipe.yaml", "--set", "letters.fail=once"]) == 130
    assert "run the same command again to resume" in capsys.readouterr().err
    assert main(["run", "letters", "--recipe", "recipe.yaml", "--set", "letters.fail=once"]) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "letters"], "which recipe? Add --recipe FILE"),
        (
            ["run", "dance", "--recipe", "recipe.yaml"],
            "align run dance: no such stage; the stages are capitals, compare",
        ),
        (["run", "dance"], "align run dance: no such stage"),
        (["run", "recipe.yaml", "--recipe", "recipe.yaml"], "align run recipe.yaml: the recipe is named twice"),
        (["launch", "all"], "which recipe? Add --recipe FILE"),
        (["launch", "dance", "--recipe", "recipe.yaml"], "recipe.yaml: no stage `dance` in this recipe"),
    ],
)
def test_what_is_missing_from_a_command_is_named(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err.startswith(said)


@pytest.mark.parametrize("words", [[], ["dance"], ["run"], ["run", "x.yaml", "--nproc", "0"]])
def test_a_command_that_makes_no_sense_ends_with_two(words: list[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(words)
    assert raised.value.code == 2


def test_constitutions_are_checked_all_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.yaml").write_text("title: Bad\n")
    assert main(["constitution", "check", "small.yaml"]) == 0
    assert capsys.readouterr().out.startswith("small.yaml: 1 principle")
    assert main(["constitution", "check", "bad.yaml", "small.yaml", "gone.yaml"]) == 2
    shown = capsys.readouterr()
    assert "small.yaml: 1 principle" in shown.out
    assert "bad.yaml: 1 problem" in shown.err
    assert "gone.yaml" in shown.err


def test_a_recipe_given_as_a_constitution_is_recognised(capsys: pytest.CaptureFixture[str]) -> None:
    Path("whole.yaml").write_text("model: {path: org/model}\nconstitution: small.yaml\nsft: {}\n")
    assert main(["constitution", "check", "whole.yaml"]) == 2
    assert capsys.readouterr().err.startswith("whole.yaml: this looks like a recipe")


@pytest.mark.parametrize(
    "verb", [["overoptimisation", "--no-plot"], ["compare-runs", "gone"], ["constitution", "stats"]]
)
def test_a_run_that_is_not_there_is_not_called_unfinished(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*verb, "gone"]) == 2
    assert capsys.readouterr().err.startswith("gone: no such folder (looked in ")


def test_a_stage_s_folder_given_as_a_run_is_recognised(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "letters", "--recipe", "recipe.yaml"]) == 0
    assert main(["overoptimisation", "--no-plot", "runs/recipe/shared/letters"]) == 2
    told = "runs/recipe/shared/letters: the folder of one stage; give the folder of its run, runs/recipe/shared\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize("words", ["settings", "plan recipe.yaml"], ids=["print", "rich"])
def test_a_reader_that_leaves_early_is_left_alone(words: str) -> None:
    command = f"{shlex.quote(sys.executable)} -m align {words}"
    # The reader is gone before anything is written.
    shell = f"set -o pipefail; (sleep 1; {command}) | true"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(FAKES), os.environ["PYTHONPATH"]])}
    done = subprocess.run(["bash", "-c", shell], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_constitution_is_shown_as_it_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["constitution", "show", "small.yaml"]) == 0
    shown = capsys.readouterr().out
    for part in ("Small", "How an answer sounds.", "calm", "hard; rule: excludes '!'", "Be calm [always]."):
        assert part in shown


def test_a_model_chats_with_what_is_piped_in(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import align.cli.chat

    asked: list[list[str]] = []
    real = align.cli.chat.prompt_ids

    def spied(tokenizer: Any, conversation: Conversation, system_prompt: str | None) -> list[int]:
        asked.append([message.role for message in conversation])
        return real(tokenizer, conversation, system_prompt)

    monkeypatch.setattr("align.cli.chat.prompt_ids", spied)
    words = ["chat", str(tiny_model_dir), "--max-new-tokens", "8", "--temperature", "1", "--seed", "3"]
    shown = []
    for _ in range(2):
        monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n\nMore\n/new\nHello"))
        assert main(words) == 0
        shown.append(capsys.readouterr().out)
    assert asked[:3] == [["user"], ["user", "assistant", "user"], ["user"]]
    assert shown[0].strip()
    assert shown[0] == shown[1], "the same seed gives the same answers"


def test_chat_finds_the_model_in_a_stages_folder(
    tiny_model_dir: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "run/sft").mkdir(parents=True)
    (folder / "run/sft/model").symlink_to(tiny_model_dir)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(["chat", "run/sft"]) == 0
    assert main(["chat", "run"]) == 2
    assert "run: not a model; the models in it: run/sft" in capsys.readouterr().err


def test_a_reward_model_cannot_chat_and_says_who_can(
    tiny_reward_dir: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "run/reward").mkdir(parents=True)
    (folder / "run/reward/model").symlink_to(tiny_reward_dir)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    assert main(["chat", "run/reward"]) == 2
    told = capsys.readouterr().err
    assert "run/reward/model: it is a LlamaForSequenceClassification, which scores answers but writes none" in told
    assert "sft, dpo or ppo" in told


def test_a_reward_model_is_refused_before_its_weights_are_read(
    tiny_reward_dir: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    shutil.copytree(tiny_reward_dir, folder / "reward")
    (folder / "reward/model.safetensors").write_bytes(b"no weights")
    assert main(["chat", "reward"]) == 2
    assert "which scores answers but writes none" in capsys.readouterr().err


def test_chat_explains_its_commands_and_sends_none_of_them(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("/help\n/dance now\n"))
    assert main(["chat", str(tiny_model_dir)]) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    explained = "/new starts a new conversation, Ctrl-C stops an answer, Ctrl-D ends the chat.\n"
    assert shown.err == f"{explained}/dance: no such command. {explained}"


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_chat_refuses_bytes_that_are_no_text(
    errors: str, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(b"\n\n/help\n\xff\xfe\n"), encoding="utf-8", errors=errors)
    monkeypatch.setattr("sys.stdin", stdin)
    assert main(["chat", str(tiny_model_dir)]) == 2
    assert "not UTF-8 text" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stdin", "code", "answers"), [(Terminal, 0, 2), (io.StringIO, 130, 1)])
def test_an_interruption_ends_only_the_answer_in_a_terminal(
    stdin: type[io.StringIO],
    code: int,
    answers: int,
    tiny_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import align.cli.chat

    begun = []

    def interrupted(stream: object, value: object) -> None:
        begun.append(value)
        raise KeyboardInterrupt

    monkeypatch.setattr(align.cli.chat._Stream, "put", interrupted)
    monkeypatch.setattr("sys.stdin", stdin("Hello\nAgain\n"))
    assert main(["chat", str(tiny_model_dir)]) == code
    assert len(begun) == answers
    assert "run the same command again to resume" not in capsys.readouterr().err


def test_the_settings_are_printed_as_the_page_has_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["settings"]) == 0
    assert capsys.readouterr().out.startswith("# Settings\n")


@pytest.mark.parametrize("option", ["--temperature=-1", "--temperature=nan", "--max-new-tokens=0"])
def test_chat_refuses_a_setting_out_of_its_range(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "some/model", option]) == 2
    assert "--temperature must be 0 or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("letters: {}\ncapitals: {}\n", "not a configuration file of accelerate"),
        ("num_processes: eight\n", "num_processes: must be a whole number above 0, got 'eight'"),
        ("", "is empty"),
    ],
)
def test_a_file_that_does_not_configure_accelerate_is_refused(
    content: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("config.yaml").write_text(content)
    assert main(["launch", "letters", "--recipe", "recipe.yaml", "--accelerate-config", "config.yaml"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("config.yaml: ") and told in said
    assert not Path("runs").exists()


def test_an_outdated_report_says_so_and_how_to_update_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import dataclasses

    import align.cli.recipe_verbs
    from align.pipeline.plan import make_plan

    command = "`align run recipe.yaml --set seed=1`"
    for state, told in (
        ("stale", f"evaluate: the figures below are out of date (seed: 0 → 1); update them with {command}\n"),
        ("done", ""),
        ("missing", ""),
    ):
        step = dataclasses.replace(make_plan(load_recipe("recipe.yaml"))["letters"], state=state, why="seed: 0 → 1")
        monkeypatch.setattr(align.cli.recipe_verbs, "make_plan", lambda recipe, step=step: {"evaluate": step})
        assert main(["report", "recipe.yaml", "--set", "seed=1"]) == 0
        assert capsys.readouterr().err == told


def write_pairs(path: str) -> None:
    rows = [{"prompt": f"Tell me {n}", "chosen": "Calm.", "rejected": "Wild!"} for n in range(12)]
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_judge_is_tested_on_human_pairs_with_tables_json_and_rows(capsys: pytest.CaptureFixture[str]) -> None:
    write_pairs("pairs.jsonl")
    words = ["judge", "calibrate", "--constitution", "small.yaml", "--kind", "rule", "--pairs", "pairs.jsonl"]
    assert main([*words, "--limit", "9", "--output", "out"]) == 0
    shown = capsys.readouterr().out
    assert "rule, small: 9 pairs of 9 prompts" in shown and "wrote out/calibration.json" in shown
    figures = json.loads(Path("out/calibration.json").read_text())
    assert (figures["judge"], figures["pairs"], figures["accuracy"]["mean"]) == ("rule", 9, 1.0)
    assert len(Path("out/judged.jsonl").read_text().splitlines()) == 9


def test_a_recipe_s_judge_is_tested_on_the_pairs_that_the_recipe_names(capsys: pytest.CaptureFixture[str]) -> None:
    write_pairs("pairs.jsonl")
    Path("judged.yaml").write_text(
        "model: {path: some/model}\nconstitution: small.yaml\njudge: {kind: rule}\n"
        "prompts: {sources: [{path: pairs.jsonl}]}\nsample: {}\nsft: {revisions: false, helpful: {sources: "
        "[{path: pairs.jsonl}]}}\ncompare: {calibration: {human: [{path: pairs.jsonl}]}}\n"
    )
    assert main(["judge", "calibrate", "--recipe", "judged.yaml"]) == 0
    [folder] = Path("runs/calibration").iterdir()
    assert folder.name.startswith("small-rule-")
    assert "12 pairs of 12 prompts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "which judge? Give --recipe FILE, or --constitution FILE with --model MODEL"),
        (["--constitution", "small.yaml", "--kind", "rule"], "which pairs? Give --pairs FILE"),
        (["--set", "seed=1"], "--set changes a recipe"),
        (["--recipe", "recipe.yaml", "--kind", "rule"], "--model and --kind are for a judge without a recipe"),
        (["--recipe", "recipe.yaml"], "recipe.yaml: needs a `constitution` and a `model`"),
    ],
)
def test_what_a_test_of_a_judge_lacks_is_named(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["judge", "calibrate", *words]) == 2
    assert capsys.readouterr().err.startswith(said)
