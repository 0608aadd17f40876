"""The number in a variable that launchers set is checked like any other input."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from align.errors import InputError
from align.pipeline.world_size import PROCESSES_VARIABLE, requested_processes
from align.run import processes


@pytest.mark.parametrize("text", ["two", "-1", "1.5", "٣x"])
@pytest.mark.parametrize(
    ("name", "read"),
    [("WORLD_SIZE", processes.world_size), ("RANK", processes.rank), (PROCESSES_VARIABLE, requested_processes)],
)
def test_a_variable_that_is_not_a_number_is_named(
    name: str, read: object, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(InputError, match=f"{name}: this environment variable must be a whole number"):
        read()  # type: ignore[operator]


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", PROCESSES_VARIABLE])
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
    assert done.stderr.startswith(f"{name}: this environment variable must be a whole number, but is 'two'")
    assert "Traceback" not in done.stderr
