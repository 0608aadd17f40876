"""What `import align` offers: a short list of names, typed, and no import that is slow before a name is used."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import align


@pytest.mark.parametrize("name", align.__all__)
def test_every_exported_name_is_the_object_of_its_own_module(name: str) -> None:
    exported = getattr(align, name)
    assert exported.__name__ == name
    assert exported is getattr(import_module(exported.__module__), name)


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(align.__file__).read_text(encoding="utf-8"))
    [typed] = [node for node in tree.body if isinstance(node, ast.If)]
    assert {alias.name for node in typed.body for alias in node.names} == set(align.__all__)
    assert (Path(align.__file__).parent / "py.typed").exists()


def test_importing_align_imports_none_of_its_modules() -> None:
    program = "import sys, align; print([name for name in sys.modules if name.startswith('align.')])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_name_is_answered_with_those_there_are() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'PPO'; it exports .*PpoTrainer"):
        align.PPO  # noqa: B018
