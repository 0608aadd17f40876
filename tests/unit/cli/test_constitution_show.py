"""What `check`, `show` and `schema` print of constitutions."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from align.__main__ import main
from align.cli.constitution_show import show_constitution

WHOLE = """\
title: Whole
version: "3"
licence: MIT
tiers: [safety]
sources: facts
principles:
  - id: kind
    text: Be [kind].
    opposite: Be rude.
    critique: Is it kind?
    revision: Make it kind.
    compare: Which is kinder?
    tags: [tone, short]
    language: ja
    tier: safety
    weight: 2
    hard: true
    framing: negative
    probes: [{prompt: Help?, better: a, worse: b}]
    applies: [talk]
    rationale: It helps.
    examples: [{prompt: Hi, completion: a, critique: b, revision: c}]
    comparisons: [{prompt: Tea?, better: a, worse: b}]
  - {id: plain, compare: Which is plainer?, sources: []}
examples: [{prompt: How are you?, completion: a, critique: b, revision: c}]
comparisons: [{prompt: Milk?, better: a, worse: b}]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "facts").mkdir()
    (tmp_path / "facts/a.txt").write_text("A fact.")
    (tmp_path / "whole.yaml").write_text(WHOLE)
    return tmp_path / "whole.yaml"


def test_show_prints_every_part(file: Path) -> None:
    console = Console(width=500, record=True)
    show_constitution(str(file), console)

    lines = console.export_text().splitlines()
    facts = file.parent / "facts"
    assert lines[0].startswith("Whole  2 principles, 0 with a rule, 1 probes, 2 examples, 2 choices, 1 folder of")
    traits = f"weight 2; hard; negative; tags tone, short; in ja; uses the documents in {facts}; applies to talk"
    assert lines[1:5] == ["version 3; licence MIT", "", "tier: safety", ""]
    assert lines[5:15] == [
        f"kind  {traits}",
        "  Be [kind].",
        "  not: Be rude.",
        "  critique: Is it kind?",
        "  revision: Make it kind.",
        "  choice: Which is kinder?",
        "  why: It helps.",
        "  probes: Help?",
        "  examples: Hi",
        "  choices: Tea?",
    ]
    assert "  choice: Which is plainer?" in lines
    assert lines[-3:] == ["example  How are you?", "", "choice  Milk?"]


def test_show_gives_the_terminal_no_commands(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text('title: "a\\e[2J"\nprinciples: [{id: a, text: "b\\e]0;c\\a"}]\n')
    console = Console(record=True)
    show_constitution(str(tmp_path / "a.yaml"), console)

    assert "\x1b" not in console.export_text(styles=False)


def test_check_tells_the_faults_of_every_file(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file.parent / "faulty.yaml").write_text("title: x\nprinciples: [{id: a}]\nsources: none\n")

    assert main(["constitution", "check", str(file), str(file.parent / "faulty.yaml")]) == 2
    said = capsys.readouterr()
    assert f"{file}: 2 principles" in said.out
    assert "line 2  principles[0]: needs a `text`" in said.err
    assert "line 3  sources: " in said.err and "no such folder" in said.err


def test_schema_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["constitution", "schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "Constitution"
