"""RLHF and Constitutional AI as one pipeline. What is listed here is the library's public interface.

Everything else may change between releases. Names are imported at first use, so `import align` is fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from align.constitution.constitution import Constitution
    from align.constitution.loading import load_constitution
    from align.errors import AlignError, InputError
    from align.feedback.judge import Judge
    from align.pipeline.recipe import Recipe, load_recipe
    from align.rl.ppo import PpoTrainer
    from align.rl.settings import PpoBlock
    from align.settings.blocks import EngineBlock, JudgeBlock, ModelBlock

__all__ = ["AlignError", "Constitution", "EngineBlock", "InputError", "Judge", "JudgeBlock", "ModelBlock", "PpoBlock"]
__all__ += ["PpoTrainer", "Recipe", "load_constitution", "load_recipe"]

_EXPORTS = {
    "align.constitution.constitution": "Constitution",
    "align.constitution.loading": "load_constitution",
    "align.errors": "AlignError InputError",
    "align.feedback.judge": "Judge",
    "align.pipeline.recipe": "Recipe load_recipe",
    "align.rl.ppo": "PpoTrainer",
    "align.rl.settings": "PpoBlock",
    "align.settings.blocks": "EngineBlock JudgeBlock ModelBlock",
}
_HOMES = {name: module for module, names in _EXPORTS.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'align' has no attribute {name!r}; it exports {', '.join(_HOMES)}")
