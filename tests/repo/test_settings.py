"""Every setting is read somewhere, and docs/settings.md describes it."""

import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

import align
from align.cli.settings import Setting, settings_of, settings_page
from align.pipeline.recipe import recipe_model
from align.settings.blocks import Block

SOURCE = Path(align.__file__).parent


def recipe_blocks() -> Iterator[type[Block]]:
    """Every class of block that a recipe can contain."""
    for module in pkgutil.walk_packages(align.__path__, "align."):
        # The kernel's module needs Triton, which comes with PyTorch for GPUs, and defines no block.
        if not module.name.endswith(("__main__", "slot_kernel")):
            importlib.import_module(module.name)
    waiting = [Block]
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        if kind is not Block and kind.__name__.endswith("Block") and kind.__module__.startswith("align."):
            yield kind


BLOCKS = sorted(set(recipe_blocks()), key=lambda kind: kind.__name__)
TEXT = "\n".join(path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py"))
# Shares of splits and limits of gates are read by name with getattr.
READ_BY_NAME = {"SplitBlock", "TextGatesBlock", "ReviseGatesBlock", "CompareGatesBlock"}


@pytest.mark.parametrize("block", BLOCKS, ids=lambda kind: kind.__name__)
def test_every_key_is_read(block: type[Block]) -> None:
    unread = [name for name in block.model_fields if not re.search(rf"\.{name}\b", TEXT)]
    assert not unread or block.__name__ in READ_BY_NAME, f"{block.__name__}: {unread} are never read"


PAGE = SOURCE.parent / "docs/settings.md"
SETTINGS = list(settings_of(list(recipe_model().model_fields)))


def test_the_page_of_settings_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == settings_page(), "run `align settings > docs/settings.md`"


def test_the_page_has_every_key_of_every_block_once() -> None:
    written = [setting.key.strip("`") for setting in SETTINGS]
    assert len(written) == len(set(written))
    last = {name.rpartition(".")[2] for name in written} | {part for name in written for part in name.split(".")}
    assert {name for block in BLOCKS for name in block.model_fields} <= {name.removesuffix("[]") for name in last}


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.key.strip("`"))
def test_a_setting_is_described_and_its_default_is_accepted(setting: Setting) -> None:
    assert setting.type and setting.meaning
    key = setting.key.strip("`")
    if not setting.default.startswith("`") or "[]" in key:
        return
    inner, *outer = reversed(key.split("."))
    content: dict[str, Any] = {inner: YAML(typ="safe").load(setting.default.strip("`"))}
    without: dict[str, Any] = {}
    for name in outer:
        content, without = {name: content}, {name: without}
    given, left_out = (recipe_model().model_validate(_with_required(each)) for each in (content, without))
    assert given == left_out, "the documented default is the value without the key"


def _with_required(content: dict[str, Any]) -> dict[str, Any]:
    """The content with the required keys of its blocks filled in."""
    required = {"model": {"path": "m"}, "prompts": {"sources": [{"path": "p"}]}}
    filled = {
        name: value | required.get(name, {}) if isinstance(value, dict) else value for name, value in content.items()
    }
    if content.get("compare", {}).get("calibration") is not None:
        filled["compare"] = {"calibration": content["compare"]["calibration"] | {"human": [{"path": "p"}]}}
    return filled


def test_setting_one_key_of_a_block_keeps_the_defaults_of_the_others() -> None:
    given = recipe_model().model_validate({"dpo": {"optimizer": {"batch_size": 8}}, "ppo": {"sampling": {"top_p": 1}}})
    assert (given.dpo.optimizer.batch_size, given.dpo.optimizer.learning_rate) == (8, 1e-5)  # type: ignore[attr-defined]
    assert given.ppo.sampling.max_new_tokens == 128  # type: ignore[attr-defined]
