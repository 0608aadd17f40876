"""What launchers put into the environment is checked like any other input."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from align.errors import InputError
from align.pipeline.world_size import ASKED, asked_processes
from align.run import processes


@pytest.mark.parametrize("text", ["two", "-1", "1.5", "٣x"])
@pytest.mark.parametrize(
    ("name", "read"),
    [("WORLD_SIZE", processes.world_size), ("RANK", processes.rank), (ASKED, asked_processes)],
)
def test_a_number_that_is_none_is_told_by_the_variables_name(
    name: str, read: object, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(InputError, match=f"{name}: this environment variable must be a whole number"):
        read()  # type: ignore[operator]


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", ASKED])
def test_the_command_ends_with_two_and_no_traceback(name: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Why?"}\n')
    recipe = "{model: {path: org/model}, prompts: {sources: [{path: prompts.jsonl}]}, sample: {}}"
    (tmp_path / "recipe.yaml").write_text(recipe)
    done = subprocess.run(
        [sys.executable, "-m", "align", "run", "sample", "--recipe", "recipe.yaml"],
        cwd=tmp_path,
        env={**os.environ, name: "two"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"{name}: this environment variable must be a whole number, and is 'two'")
    assert "Traceback" not in done.stderr
