"""The error about a number that is NaN or infinite."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from align.records import Message
from align.rl.experience import not_finite


def completion(text: str) -> Any:
    prompt = SimpleNamespace(id="abc", prompt=(Message("system", "Be kind."), Message("user", text)))
    return SimpleNamespace(prompt=SimpleNamespace(prompt=prompt))


def test_the_prompt_is_named_by_its_text_on_one_line_without_control_characters() -> None:
    said = str(not_finite("loss is nan", 2, completion("Why\n\x1b[31m là? " + "x" * 100), Path("out")))
    assert "at step 3, prompt 'abc' ('Why \ufffd[31m là? xxx" in said
    assert "x…')" in said and "x" * 80 not in said
    assert "\n" not in said and "\x1b" not in said


def test_no_prompt_is_named_where_none_is_known_to_be_the_cause() -> None:
    said = str(not_finite("gradient was not finite 6 times in a row", 0, None, Path("out")))
    assert said.startswith("ppo: gradient was not finite 6 times in a row at step 1. The run stopped")
