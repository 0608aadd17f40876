"""`align engine check` says what an engine did when it was tried, and which judges it can serve."""

import json
from pathlib import Path

import pytest
from faulty_server import FaultyServer, chat_reply

from align.__main__ import main


def plain(path, body):
    """A server without log-probabilities that obeys seeds and limits, and names a letter where it is asked for one."""
    if "one letter" in body["messages"][-1]["content"]:
        return chat_reply("A")
    return talkative(path, body)


def talkative(path, body):
    """One that answers every question with other words than a letter."""
    text = f"{body['messages'][-1]['content'][:9]} {body.get('seed') if body.get('temperature') else 'greedy'}"
    return chat_reply(text, "length" if body["max_tokens"] < 5 else "stop")


def checked(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["engine", "check", *words]) == 0
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")


def test_a_server_without_log_probabilities_can_serve_a_judge_by_choice(capsys: pytest.CaptureFixture[str]) -> None:
    with FaultyServer(plain) as server:
        said = checked(capsys, "--base-url", server.base_url, "--model", "served")
    assert "lists the model yes served" in said
    assert "ends its turn yes finish reason stop" in said
    assert "reports truncation yes finish reason length" in said
    assert "samples follow the seed yes same seed: same text; other seed: different text; greedy: same text" in said
    assert "scores one-word choices yes by vote of 8 samples" in said
    assert "scores whole texts no" in said
    assert "kinds of judge choice, rule" in said


def test_a_server_that_names_no_letter_can_serve_no_judge_by_choice(capsys: pytest.CaptureFixture[str]) -> None:
    with FaultyServer(talkative) as server:
        said = checked(capsys, "--base-url", server.base_url, "--model", "served")
    assert "scores one-word choices no by vote of 8 samples: neither A nor B was among them" in said
    assert "kinds of judge rule" in said


def test_an_address_without_its_scheme_is_refused_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["engine", "check", "--base-url", "localhost:8000/v1", "--model", "served"]) == 2
    assert "--base-url: must begin with http:// or https://" in capsys.readouterr().err


def test_a_model_in_this_process_can_serve_every_judge(
    tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = checked(capsys, "--model", str(tiny_model_dir))
    assert "kinds of judge choice, contrast, rule" in said


def test_the_different_engines_of_a_recipe_are_each_tried_once(
    tmp_path: Path, tiny_model_dir: Path, tiny_prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FaultyServer(plain) as one, FaultyServer(plain) as other:
        first, second = (
            {"kind": "openai", "model": name, "base_url": server.base_url}
            for name, server in (("one", one), ("other", other))
        )
        recipe = {
            "model": {"path": str(tiny_model_dir)},
            "prompts": {"sources": [{"path": str(tiny_prompts)}]},
            "constitution": "constitutions/style-asking.yaml",
            "judge": {"kind": "choice", "engine": second},
            "sample": {"engine": first},
            "revise": {"engine": first, "critic": second},
        }
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
        said = checked(capsys, "--recipe", str(tmp_path / "recipe.yaml"))
    assert "sample.engine, revise.engine: one at" in said
    assert "revise.critic, judge.engine: other at" in said


def test_an_engine_that_cannot_be_opened_is_reported_and_the_others_are_tried(
    tmp_path: Path, tiny_prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FaultyServer(plain) as server:
        served = {"kind": "openai", "model": "served", "base_url": server.base_url}
        recipe = {
            "model": {"path": "org/gone"},
            "prompts": {"sources": [{"path": str(tiny_prompts)}]},
            "constitution": "constitutions/style-asking.yaml",
            "judge": {"kind": "rule"},
            "sample": {},
            "revise": {"engine": served},
        }
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
        assert main(["engine", "check", "--recipe", str(tmp_path / "recipe.yaml")]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("sample.engine") and "org/gone, local: model org/gone: no such folder" in shown.err
    assert "revise.engine: served at" in shown.out


def test_missing_options_and_unreachable_servers_are_reported(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr("align.engines.server_faults.INITIAL_DELAY", 0.001)
    assert main(["engine", "check"]) == 2
    assert "--recipe FILE" in capsys.readouterr().err
    assert main(["engine", "check", "--base-url", "http://127.0.0.1:9/v1", "--model", "m"]) == 2
    assert "cannot be reached" in capsys.readouterr().err
