"""The direction of imports is declared for every module, and kept."""

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
LAYERS = [
    {name.strip() for name in layer.split("|")}
    for contract in CONTRACTS
    if contract["type"] == "layers"
    for layer in contract["layers"]
]
MODULES = sorted(
    path.stem if path.is_file() else path.name
    for path in (ROOT / "align").iterdir()
    if (path.suffix == ".py" and path.stem != "__init__") or (path / "__init__.py").exists()
)


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_its_layer(module: str) -> None:
    assert sum(module in layer for layer in LAYERS) == 1, "give the new module its layer in pyproject.toml"


def test_no_layer_names_a_module_that_is_not_there() -> None:
    assert set().union(*LAYERS) - set(MODULES) == set()


def test_the_linter_itself_checks_stages_backends_and_rooms() -> None:
    kinds = [contract["type"] for contract in CONTRACTS]
    assert kinds.count("independence") == 2
    assert kinds.count("forbidden") == 3
    assert all(contract.get("exhaustive") for contract in CONTRACTS if contract["type"] == "layers")


def test_every_backend_is_held_apart_from_the_others() -> None:
    named = {name for contract in CONTRACTS if contract["type"] == "independence" for name in contract["modules"]}
    helpers = {"__init__", "complete_all", "open", "server_faults", "server_replies", "server_scores"}
    backends = {path.stem for path in (ROOT / "align/backends").glob("*.py")} - helpers
    assert {f"align.engines.{name}" for name in backends} <= named
