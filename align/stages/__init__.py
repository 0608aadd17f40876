"""The stages of the pipeline: every module here that defines `STAGE` is one, so a new file is a new stage."""

import importlib
import pkgutil
from functools import cache

from align.run.stage import Stage


@cache
def all_stages() -> dict[str, Stage]:
    """Every stage by name. Loads no tensor library."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = (importlib.import_module(f"{__name__}.{name}") for name in names)
    stages = [module.STAGE for module in modules if hasattr(module, "STAGE")]
    return {stage.name: stage for stage in stages}
