"""Where each row of the critique loop comes from: `provenance.jsonl` beside a stage's rows, which name its entries.

What many rows have in common (engine, weights, sampling, constitution) is one entry, named by a digest of itself; what
is a row's own (principles, seeds) stands in the row. A stage's file has the entries of earlier stages that its rows
name as well, so that a folder tells all by itself.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import ValidationError

from align.constitution.constitution import Constitution
from align.engines.engine import Engine, EngineIdentity
from align.errors import AlignError, InputError
from align.records import Row, digest, read_rows, write_rows
from align.run import processes
from align.run.artefacts import write_json
from align.run.stage import Context
from align.settings.blocks import EngineBlock, JudgeBlock, ModelBlock

PROVENANCE = "provenance.jsonl"
CONSTITUTION = "constitution.json"
Step = Literal["completion", "critique", "revision", "label"]
RULE = EngineIdentity("rule", "")
"""The identity of a judge that asks no model: a program checks the principles' rules."""

NOT_OF_THE_JUDGE = {"engine", "batch_size", "allow_chance"}
"""Keys of a judge that change no label, or that the entry tells elsewhere."""


@dataclass(frozen=True)
class Provenance(Row):
    """How some texts or labels were made.

    `engine` is 'local' (a model in this process), 'server', 'rule' or 'scripted'; `model_digest` the SHA-256 of the
    weights, and empty where nobody here has read them: `verified` is false then, and `server_says` what a server says
    of its model. `settings` are those of sampling, of a judge, of the loop. `seed` is the recipe's, from which those of
    the rows follow.
    """

    id: str
    stage: str
    step: Step
    engine: str
    model: str
    model_digest: str = ""
    model_revision: str = ""
    precision: str = ""
    verified: bool = False
    server_says: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    constitution: str = ""
    constitution_digest: str = ""
    seed: int = 0

    @classmethod
    def of(
        cls,
        stage: str,
        step: Step,
        engine: EngineIdentity,
        settings: Mapping[str, Any],
        seed: int,
        constitution: Constitution | None = None,
    ) -> Self:
        """An entry, named by what it says."""
        content: dict[str, Any] = {
            "stage": stage,
            "step": step,
            "engine": engine.kind,
            "model": engine.model,
            "model_digest": engine.digest,
            "model_revision": engine.revision,
            "precision": engine.precision,
            "verified": bool(engine.digest) or engine.kind == RULE.kind,
            "server_says": dict(engine.said),
            "settings": dict(settings),
            "constitution": constitution.id if constitution else "",
            "constitution_digest": constitution.digest if constitution else "",
            "seed": seed,
        }
        return cls(id=_entry_id(content), **content)

    def with_label(self, block: JudgeBlock, constitution: Constitution, **how: Any) -> Self:
        """The entry of labels that are made of the same engine's answers by other settings or another constitution."""
        now: dict[str, Any] = {
            "settings": {**self.settings, **_of_labels(block), **how},
            "constitution": constitution.id,
            "constitution_digest": constitution.digest,
        }
        return dataclasses.replace(self, id=_entry_id(self.to_json() | now), **now)


def _entry_id(content: Mapping[str, Any]) -> str:
    """A digest of what an entry says. A constitution is known by its own digest, whatever its file is called."""
    return digest({key: value for key, value in content.items() if key not in ("id", "constitution")}, 12)


def text_provenance(
    context: Context,
    step: Step,
    engine: Engine,
    block: EngineBlock,
    constitution: Constitution | None = None,
    *,
    writer: str = "",
    **how: Any,
) -> Provenance:
    """The entry of texts that an engine writes in a stage, by the sampling settings of its block.

    Args:
        writer: which of a stage's engines it is, where several take the same step.
        how: what else decides how the texts come out.
    """
    settings = {**sampling_settings(context), **_named(block.extra), **how}
    identity = settled_identity(engine, context.output, writer or step)
    return Provenance.of(context.stage, step, identity, settings, context.seed, constitution)


def sampling_settings(context: Context) -> dict[str, Any]:
    """How a stage samples: its sampling block, and the system prompt where the model has one."""
    model: ModelBlock = context.shared["model"]
    system = {"system_prompt": model.system_prompt} if model.system_prompt else {}
    return {**context.settings.sampling.model_dump(mode="json"), **system}


def label_provenance(
    context: Context, engine: Engine | None, block: JudgeBlock, constitution: Constitution, **how: Any
) -> Provenance:
    """The entry of a judge's labels; without a `engine` it asks no model."""
    settings = {**_of_labels(block), **_named(block.engine.extra), **how}
    identity = settled_identity(engine, context.output, "label") if engine else RULE
    return Provenance.of(context.stage, "label", identity, settings, context.seed, constitution)


def settle_judge(engine: Engine | None, output: Path) -> None:
    """Settle who judges, and how its choices are scored, before the probes are asked; of nobody without a `engine`.

    Raises:
        InputError: the engine has another model, or scores choices in another way, than when the stage began.
    """
    if engine is not None:
        settled_identity(engine, output, "label")
        processes.decide_on_first_rank(lambda: _settle_method(engine, output / "method-of-label.json"))


def _settle_method(engine: Engine, kept: Path) -> None:
    """A stage whose journal held both votes and log-probabilities would call all of them by one name."""
    if not kept.exists():
        write_json(kept, {"scored_by": engine.choice_method})
        return
    before = json.loads(kept.read_text(encoding="utf-8"))["scored_by"]
    try:
        now = engine.choice_method
    except AlignError:
        return  # what is not asked for any more needs no server
    if now != before:
        raise InputError(
            f"engine {engine.name}: scores choices by {now} now, and by {before} when this stage began; serve the "
            f"model as before, or remove {kept.parent} to begin anew"
        )


def _of_labels(block: JudgeBlock) -> dict[str, Any]:
    return block.model_dump(mode="json", exclude=NOT_OF_THE_JUDGE)


def _named(extra: Mapping[str, Any]) -> dict[str, Any]:
    """A server's further keys. Texts and lists among them may be secrets: the manifest alone has those."""
    shown = {key: value if isinstance(value, bool | int | float) else "in the manifest" for key, value in extra.items()}
    return {"extra": shown} if shown else {}


def settled_identity(engine: Engine, output: Path, step: str) -> EngineIdentity:
    """Which model an engine has, in every process. It is settled before the engine is asked anything, and again when a
    stage goes on.

    Args:
        step: what the engine does in the stage.
        output: the stage's folder, which keeps what was found first.

    Raises:
        InputError: the engine has another model than when the stage began.
    """
    return processes.decide_on_first_rank(lambda: _settled(engine, output / f"engine-of-{step}.json"))


def _settled(engine: Engine, kept: Path) -> EngineIdentity:
    """The digests of weights are kept too: files that have not changed are not read again."""
    weights = getattr(engine, "weights", None)
    if not kept.exists():
        identity = engine.identity()
        found = {"identity": dataclasses.asdict(identity), "weights": weights.digests if weights else {}}
        write_json(kept, found)
        return identity
    found = json.loads(kept.read_text(encoding="utf-8"))
    before = EngineIdentity(**found["identity"])
    if weights:
        weights.digests.update(found["weights"])
    try:
        now = engine.identity()
    except AlignError:
        return before  # what is not asked for any more needs no server
    is_silent = now.kind == "server" and not (now.said and before.said)
    if now != before and not is_silent:
        raise InputError(_exchanged(engine.name, before, now, kept.parent))
    return before


def _exchanged(engine: str, before: EngineIdentity, now: EngineIdentity, folder: Path) -> str:
    if now.kind == "server":
        return (
            f"engine {engine}: the server says that it has {dict(now.said)} now, and when this stage began it said "
            f"{dict(before.said)}; serve that model again, or remove {folder} to begin anew"
        )
    old, new = dataclasses.asdict(before), dataclasses.asdict(now)
    changed = ", ".join(
        f"{key} {old[key] or 'unknown'} before, {new[key] or 'unknown'} now" for key in old if old[key] != new[key]
    )
    return (
        f"engine {engine}: not the model that this stage began with ({changed}); put that one back, or remove "
        f"{folder} to begin anew"
    )


def write_constitution(output: Path, constitution: Constitution) -> None:
    """Keep the principles beside the rows that name them, the folders of documents by their digests alone."""
    if processes.is_first():
        write_json(output / CONSTITUTION, constitution.without_folders().model_dump(mode="json"))


def read_constitution(path: Path) -> Constitution:
    """The constitution that `write_constitution` kept: its digest is the same, and documents cannot be read of it.

    Raises:
        InputError: the file is damaged, or of another version.
    """
    try:
        return Constitution.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise InputError(
            f"{path}: damaged, or of another version ({error.error_count()} faults); remove {path.parent} and run again"
        ) from None


def read_provenance(folder: Path) -> dict[str, Provenance]:
    """A published stage's entries by id; none of a stage that an earlier version made."""
    path = folder / PROVENANCE
    return {entry.id: entry for entry in read_rows(path, Provenance)} if path.is_file() else {}


def write_provenance(output: Path, made: Iterable[Provenance], upstream: Iterable[Path] = ()) -> None:
    """Write a stage's own entries, and those of the stages that its rows quote. The first process writes.

    Args:
        upstream: the folders of those stages.
    """
    if not processes.is_first():
        return
    entries = {entry.id: entry for entry in made}
    for folder in upstream:
        entries = {**read_provenance(folder), **entries}
    write_rows(output / PROVENANCE, entries.values())
