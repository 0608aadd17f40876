"""Imports stay light: reading a recipe imports no tensor library, and formulas import only torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("bm25s", "torch", "transformers", "trl", "datasets", "peft", "accelerate", "wandb")
LIGHT_ROOMS = "constitution pipeline run settings stages".split()
LIGHT_MODULES = (
    "__main__ errors records cli.constitution_schema cli.make_rules cli.plan data.pairs data.prompts data.sources "
    "evaluation.report"
).split()
LIGHT = [
    *(f"align.{name}" for name in LIGHT_MODULES),
    *(
        f"align.{room}.{path.stem}"
        for room in LIGHT_ROOMS
        for path in sorted((ROOT / "align" / room).glob("*.py"))
        if path.stem != "__init__"
    ),
]


def test_light_modules_import_no_tensor_library() -> None:
    program = (
        "import importlib, sys\n"
        "for name in sys.argv[1].split():\n"
        "    importlib.import_module(name)\n"
        f"    heavy = set({HEAVY!r}) & set(sys.modules)\n"
        "    assert not heavy, f'{name} imports {sorted(heavy)}'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, " ".join(LIGHT)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", ["advantages", "losses"])
def test_formulas_import_torch_and_the_standard_library_alone(name: str) -> None:
    imported = set(_imported(ROOT / f"align/rl/{name}.py"))
    assert "torch" in imported
    assert imported - set(sys.stdlib_module_names) == {"torch"}


@pytest.mark.parametrize("path", sorted((ROOT / "align").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled_or_evaluated(path: Path) -> None:
    calls = {
        _called(node) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
    }
    assert not calls & {"eval", "exec", "pickle.load", "pickle.loads", "yaml.unsafe_load", "os.system"}


def _imported(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    plain = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    plain += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return [name.split(".")[0] for name in plain]


def _called(call: ast.Call) -> str:
    return ast.unparse(call.func)
