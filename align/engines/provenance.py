"""Records how each text and label was made, in a `provenance.jsonl` beside a stage's rows.

What many rows have in common (engine, weights, sampling settings, constitution) is one entry, whose id is a digest of
its content and stands in each of those rows; what differs between them (principles, seeds) is in the row. The entries
of earlier stages that a stage's rows refer to are copied into its file, so that its folder is complete.
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
"""The identity of a judge without a model: a program checks the principles' rules."""

OMITTED_JUDGE_KEYS = {"engine", "batch_size", "allow_chance"}
"""Keys of a judge that do not change its labels, or that other fields of the entry describe."""


@dataclass(frozen=True)
class Provenance(Row):
    """How some texts or labels were made.

    `engine` is 'local' (a model in this process), 'server', 'rule' or 'scripted'. `model_digest` is the SHA-256 of the
    weights. If they were not read on this machine, it is empty and `verified` false; `server_says` is then a server's
    description of its model. `settings` are those of the sampling, the judge or the loop. `seed` is the recipe's, from
    which the seeds of the rows are derived.
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
        """An entry whose id is the digest of its content."""
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
        """The entry of labels made from the same engine's answers with other settings or another constitution."""
        changes: dict[str, Any] = {
            "settings": {**self.settings, **_label_settings(block), **how},
            "constitution": constitution.id,
            "constitution_digest": constitution.digest,
        }
        return dataclasses.replace(self, id=_entry_id(self.to_json() | changes), **changes)


def _entry_id(content: Mapping[str, Any]) -> str:
    """The digest of an entry's content. Its constitution counts by its digest, whatever the name of its file."""
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
    """The entry of texts that an engine generates in a stage.

    Args:
        writer: tells a stage's engines apart where several take the same step.
        how: further settings that change the texts.
    """
    settings = {**sampling_settings(context), **_public_extra(block.extra), **_date(engine), **how}
    identity = pin_identity(engine, context.output, writer or step)
    return Provenance.of(context.stage, step, identity, settings, context.seed, constitution)


def _date(engine: Engine | None) -> dict[str, str]:
    """The day in the engine's prompts, if its chat template prints one."""
    day = getattr(engine, "date", "")
    return {"date": day} if day else {}


def sampling_settings(context: Context) -> dict[str, Any]:
    """A stage's sampling settings: its `sampling` block, and the model's system prompt if it has one."""
    model: ModelBlock = context.shared["model"]
    system = {"system_prompt": model.system_prompt} if model.system_prompt else {}
    return {**context.settings.sampling.model_dump(mode="json"), **system}


def label_provenance(
    context: Context, engine: Engine | None, block: JudgeBlock, constitution: Constitution, **how: Any
) -> Provenance:
    """The entry of a judge's labels. A judge by rules has no engine."""
    settings = {**_label_settings(block), **_public_extra(block.engine.extra), **_date(engine), **how}
    identity = pin_identity(engine, context.output, "label") if engine else RULE
    return Provenance.of(context.stage, "label", identity, settings, context.seed, constitution)


def pin_judge(engine: Engine | None, output: Path) -> None:
    """Pin the judge's model and the way it scores choices, before the probes are judged. No-op for a judge by rules.

    Raises:
        InputError: the engine's model or its way of scoring has changed since the stage began.
    """
    if engine is not None:
        pin_identity(engine, output, "label")
        processes.decide_on_first_rank(lambda: _pin_method(engine, output / "method-of-label.json"))


def _pin_method(engine: Engine, pinned: Path) -> None:
    """A journal with both votes and log-probabilities would be reported as if it had only one of them."""
    if not pinned.exists():
        write_json(pinned, {"scored_by": engine.choice_method})
        return
    before = json.loads(pinned.read_text(encoding="utf-8"))["scored_by"]
    try:
        now = engine.choice_method
    except AlignError:
        return  # if every answer is in the journal, the server is not needed
    if now != before:
        raise InputError(
            f"engine {engine.name}: scores choices by {now} now, and by {before} when this stage began; serve the "
            f"model as before, or remove {pinned.parent} to start over"
        )


def _label_settings(block: JudgeBlock) -> dict[str, Any]:
    return block.model_dump(mode="json", exclude=OMITTED_JUDGE_KEYS)


def _public_extra(extra: Mapping[str, Any]) -> dict[str, Any]:
    """The `extra` keys of an engine. Texts and lists may be secrets, so only the manifest has their values."""
    shown = {key: value if isinstance(value, bool | int | float) else "in the manifest" for key, value in extra.items()}
    return {"extra": shown} if shown else {}


def pin_identity(engine: Engine, output: Path, step: str) -> EngineIdentity:
    """Which model an engine has, in every process. It is pinned before the first request and checked on resume.

    Args:
        output: the stage's folder, where the identity is stored.
        step: what the engine does in the stage.

    Raises:
        InputError: the engine's model has changed since the stage began.
    """
    return processes.decide_on_first_rank(lambda: _pinned_identity(engine, output / f"engine-of-{step}.json"))


def _pinned_identity(engine: Engine, pinned: Path) -> EngineIdentity:
    """The digests of weight files are stored too, so that unchanged files are not hashed again."""
    weights = getattr(engine, "weights", None)
    if not pinned.exists():
        identity = engine.identity()
        write_json(pinned, {"identity": dataclasses.asdict(identity), "weights": weights.digests if weights else {}})
        return identity
    stored = json.loads(pinned.read_text(encoding="utf-8"))
    before = EngineIdentity(**stored["identity"])
    if weights:
        weights.digests.update(stored["weights"])
    try:
        now = engine.identity()
    except AlignError:
        return before  # if every answer is in the journal, the server is not needed
    is_unknown = now.kind == "server" and not (now.said and before.said)
    if now != before and not is_unknown:
        raise InputError(_model_changed(engine.name, before, now, pinned.parent))
    return before


def _model_changed(engine: str, before: EngineIdentity, now: EngineIdentity, folder: Path) -> str:
    if now.kind == "server":
        return (
            f"engine {engine}: the server reports the model {dict(now.said)} now, and reported "
            f"{dict(before.said)} when this stage began; serve that model again, or remove {folder} to start over"
        )
    old, new = dataclasses.asdict(before), dataclasses.asdict(now)
    changed = ", ".join(
        f"{key} {old[key] or 'unknown'} before, {new[key] or 'unknown'} now" for key in old if old[key] != new[key]
    )
    return (
        f"engine {engine}: not the model that this stage began with ({changed}); restore that model, or remove "
        f"{folder} to start over"
    )


def write_constitution(output: Path, constitution: Constitution) -> None:
    """Write the principles beside the rows that name them. Document folders are reduced to their digests."""
    if processes.is_first():
        write_json(output / CONSTITUTION, constitution.without_folders().model_dump(mode="json"))


def read_constitution(path: Path) -> Constitution:
    """The constitution that `write_constitution` wrote, with the same digest, but without its documents.

    Raises:
        InputError: the file is damaged, or from another version of align.
    """
    try:
        return Constitution.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise InputError(
            f"{path}: damaged, or from another version of align ({error.error_count()} errors); remove {path.parent} "
            "and run again"
        ) from None


def read_provenance(folder: Path) -> dict[str, Provenance]:
    """A published stage's entries by id; empty if the stage was made by a version of align without provenance."""
    path = folder / PROVENANCE
    return {entry.id: entry for entry in read_rows(path, Provenance)} if path.is_file() else {}


def write_provenance(output: Path, made: Iterable[Provenance], upstream: Iterable[Path] = ()) -> None:
    """Write a stage's entries and those of the stages that its rows refer to. Only the first process writes.

    Args:
        upstream: the folders of the stages referred to.
    """
    if not processes.is_first():
        return
    entries = {entry.id: entry for entry in made}
    for folder in upstream:
        entries = {**read_provenance(folder), **entries}
    write_rows(output / PROVENANCE, entries.values())
