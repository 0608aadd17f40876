"""The import contract covers every module."""

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


def test_no_layer_names_a_missing_module() -> None:
    assert set().union(*LAYERS) - set(MODULES) == set()


def test_the_linter_has_its_contracts_for_stages_engines_and_rooms() -> None:
    kinds = [contract["type"] for contract in CONTRACTS]
    assert kinds.count("independence") == 2
    assert kinds.count("forbidden") == 2
    assert all(contract.get("exhaustive") for contract in CONTRACTS if contract["type"] == "layers")


def test_every_engine_is_independent_of_the_others() -> None:
    named = {name for contract in CONTRACTS if contract["type"] == "independence" for name in contract["modules"]}
    helpers = {"__init__", "check", "complete_all", "engine", "open", "provenance"} | {
        "server_faults",
        "server_refusals",
        "server_replies",
        "server_scores",
    }
    engines = {path.stem for path in (ROOT / "align/engines").glob("*.py")} - helpers
    assert {f"align.engines.{name}" for name in engines} <= named
