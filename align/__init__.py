"""RLHF and Constitutional AI as one pipeline. What is listed here is the library's public interface.

Everything else may change between releases. Names are imported at first use, so `import align` is fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from align.constitution.constitution import Constitution as Constitution
    from align.constitution.loading import load_constitution as load_constitution
    from align.errors import AlignError as AlignError
    from align.errors import InputError as InputError
    from align.feedback.judge import Judge as Judge
    from align.pipeline.recipe import Recipe as Recipe
    from align.pipeline.recipe import load_recipe as load_recipe
    from align.rl.ppo import PpoTrainer as PpoTrainer
    from align.rl.settings import PpoBlock as PpoBlock
    from align.settings.blocks import EngineBlock as EngineBlock
    from align.settings.blocks import JudgeBlock as JudgeBlock
    from align.settings.blocks import ModelBlock as ModelBlock

_HOMES = {
    "AlignError": "align.errors",
    "Constitution": "align.constitution.constitution",
    "EngineBlock": "align.settings.blocks",
    "InputError": "align.errors",
    "Judge": "align.feedback.judge",
    "JudgeBlock": "align.settings.blocks",
    "ModelBlock": "align.settings.blocks",
    "PpoBlock": "align.rl.settings",
    "PpoTrainer": "align.rl.ppo",
    "Recipe": "align.pipeline.recipe",
    "load_constitution": "align.constitution.loading",
    "load_recipe": "align.pipeline.recipe",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'align' has no attribute {name!r}; it exports {', '.join(_HOMES)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
