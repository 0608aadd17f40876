"""A run's rows as data sets in TRL's formats, with the provenance of each written out whole.

| data set | rows | TRL's format |
|---|---|---|
| preferences | `compare/pairs.jsonl` | conversational preference; `margin` is 2 `probability` - 1 |
| sft | `sft/demonstrations.jsonl` | conversational language modelling (`messages`) |
| revisions | `revise/revisions.jsonl` | conversational prompt-completion, with every round |
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from align.engines.provenance import Provenance
from align.errors import InputError
from align.feedback.records import Critique, Revision
from align.records import Demonstration, Message, PreferencePair, as_dicts, read_rows
from align.results.published import PublishedRun
from align.stages.reward import is_held_out

if TYPE_CHECKING:
    import pyarrow as pa

SplitRow = tuple[str, dict[str, Any]]
TRAIN, TEST = "train", "test"
MADE_HERE = ("revision", "own")
"""The sources of demonstrations that the run made itself."""

DRAWN = ("temperature", "top_p", "max_new_tokens")
"""The settings of sampling that have columns of their own."""


@dataclass(frozen=True)
class DataSet:
    """One data set that a run can be exported as: the stage and file it comes from, its columns and its rows.

    `splits_by` is the stage that decides which rows are the test split.
    """

    name: str
    stage: str
    file: str
    form: str
    schema: "Callable[[], pa.Schema]"
    rows: Callable[[PublishedRun], Iterator[SplitRow]]
    splits_by: str = ""


def preference_rows(run: PublishedRun) -> Iterator[SplitRow]:
    """The judge's pairs. Those whose prompts the reward stage holds out are the test split."""
    entries = _Entries(run, "compare")
    share = _held_out_share(run)
    for pair in read_rows(run.rows("compare", "pairs.jsonl"), PreferencePair):
        yield (
            TEST if is_held_out(pair.prompt, share) else TRAIN,
            {
                "id": pair.id,
                "prompt": as_dicts(pair.prompt),
                "chosen": as_dicts(pair.chosen),
                "rejected": as_dicts(pair.rejected),
                "probability": pair.probability,
                "margin": 2 * pair.probability - 1,
                "source": pair.source,
                "category": pair.category,
                "judged_by": list(pair.judged_by),
                "revised_by": list(pair.revised_by),
                "chosen_provenance": entries.whole(pair.chosen_provenance, pair.chosen_seed),
                "rejected_provenance": entries.whole(pair.rejected_provenance, pair.rejected_seed),
                "judge_provenance": entries.whole(pair.judge_provenance),
            },
        )


def sft_rows(run: PublishedRun) -> Iterator[SplitRow]:
    """What the SFT policy was trained on. Demonstrations that people wrote have no provenance."""
    entries = _Entries(run, "sft")
    for row in read_rows(run.rows("sft", "demonstrations.jsonl"), Demonstration):
        yield (
            TRAIN,
            {
                "id": row.id,
                "messages": as_dicts((*row.prompt, Message("assistant", row.completion))),
                "source": public_path(row.source),
                "revised_by": list(row.revised_by),
                "judged_by": list(row.judged_by),
                "p_better": row.p_better,
                "provenance": entries.whole(row.provenance, row.seed),
                "judge_provenance": entries.whole(row.judge_provenance),
            },
        )


def revision_rows(run: PublishedRun) -> Iterator[SplitRow]:
    """Accepted revisions with their originals and every round that led to them."""
    entries = _Entries(run, "revise")
    critiques = read_rows(run.rows("revise", "critiques.jsonl"), Critique)
    chains = groupby(critiques, key=lambda each: each.prompt_id)
    for row in _revisions(run):
        rounds = next((list(chain) for prompt_id, chain in chains if prompt_id == row.prompt_id), [])
        critic = next(((each.critique_provenance, each.critique_seed) for each in rounds), ("", None))
        yield (
            TRAIN,
            {
                "id": row.id,
                "prompt": as_dicts(row.prompt),
                "completion": as_dicts((Message("assistant", row.completion),)),
                "original": row.original,
                "rounds": [_round(each) for each in rounds],
                "p_better": row.p_better,
                "split": row.split,
                "category": row.category,
                "revised_by": list(row.revised_by),
                "judged_by": list(row.judged_by),
                "original_provenance": entries.whole(row.original_provenance, row.original_seed),
                "critique_provenance": entries.whole(*critic),
                "provenance": entries.whole(row.provenance, row.seed),
                "judge_provenance": entries.whole(row.judge_provenance),
            },
        )


def public_path(path: str) -> str:
    """A path without the folders of this machine: one that leads out of this folder by its last part, others as they
    are."""
    parts = path.replace("\\", "/").rstrip("/").split("/")
    leads_out = path.startswith(("/", "~", "\\", "file:")) or path[1:3] in (":\\", ":/") or ".." in parts
    return parts[-1].removeprefix("file:") if leads_out else path


class _Entries:
    """The provenance that a stage wrote, written out for a row."""

    def __init__(self, run: PublishedRun, stage: str) -> None:
        self._known = run.provenance(stage)
        self._folder = run.stage(stage)

    def whole(self, entry_id: str, seed: int | None = None) -> dict[str, Any] | None:
        """The entry that a row names, with the row's own seed; None where the row names none.

        Raises:
            InputError: the stage has no such entry.
        """
        if not entry_id:
            return None
        if entry_id not in self._known:
            raise InputError(f"{self._folder}: no provenance {entry_id}, which a row names; remove it and run it again")
        return written_out(self._known[entry_id], seed)


def written_out(entry: Provenance, seed: int | None) -> dict[str, Any]:
    """An entry as columns; what differs from engine to engine as JSON."""
    others = {key: value for key, value in entry.settings.items() if key not in DRAWN}
    return {
        "stage": entry.stage,
        "step": entry.step,
        "engine": entry.engine,
        "model": public_path(entry.model),
        "model_digest": entry.model_digest,
        "model_revision": entry.model_revision,
        "verified": entry.verified,
        "server_says": json.dumps(entry.server_says, sort_keys=True) if entry.server_says else "",
        "precision": entry.precision,
        **{key: entry.settings.get(key) for key in DRAWN},
        "settings": json.dumps(others, sort_keys=True, ensure_ascii=False),
        "constitution": entry.constitution,
        "constitution_digest": entry.constitution_digest,
        "seed": seed,
        "recipe_seed": entry.seed,
    }


def _revisions(run: PublishedRun) -> Iterator[Revision]:
    return read_rows(run.rows("revise", "revisions.jsonl"), Revision)


def _round(made: Critique) -> dict[str, Any]:
    return {
        "round": made.round,
        "principle": made.principle_id,
        "completion": made.completion,
        "critique": made.critique,
        "revision": made.revision,
        "finish_reason": made.finish_reason,
        "critique_finish_reason": made.critique_finish_reason,
        "critique_seed": made.critique_seed,
        "revision_seed": made.seed,
        "evidence": list(made.evidence),
        "cited": list(made.cited),
    }


def _held_out_share(run: PublishedRun) -> float:
    """The share of prompts that the run's reward model is tested on; 0 where it has none."""
    if "reward" not in run.manifests:
        return 0.0
    settings: Mapping[str, Any] = run.manifests["reward"].settings["settings"]
    return float(settings["held_out"]) if settings["ai"] else 0.0


def _fields() -> dict[str, "pa.DataType"]:
    """The types that columns are made of."""
    import pyarrow as pa

    text, number = pa.string(), pa.float64()
    origin = {
        **dict.fromkeys(("stage", "step", "engine", "model", "model_digest", "model_revision"), text),
        "verified": pa.bool_(),
        "server_says": text,
        "precision": text,
        "temperature": number,
        "top_p": number,
        "max_new_tokens": pa.int64(),
        **dict.fromkeys(("settings", "constitution", "constitution_digest"), text),
        "seed": pa.int64(),
        "recipe_seed": pa.int64(),
    }
    rounds = {
        "round": pa.int64(),
        **dict.fromkeys(("principle", "completion", "critique", "revision"), text),
        **dict.fromkeys(("finish_reason", "critique_finish_reason"), text),
        **dict.fromkeys(("critique_seed", "revision_seed"), pa.int64()),
        **dict.fromkeys(("evidence", "cited"), pa.list_(text)),
    }
    return {
        "text": text,
        "texts": pa.list_(text),
        "number": number,
        "messages": pa.list_(pa.struct({"role": text, "content": text})),
        "rounds": pa.list_(pa.struct(rounds)),
        "origin": pa.struct(origin),
    }


def _schema(**columns: str) -> "Callable[[], pa.Schema]":
    """A schema of columns by the names of their types; made where pyarrow is wanted."""

    def made() -> "pa.Schema":
        import pyarrow as pa

        types = _fields()
        return pa.schema({name: types[kind] for name, kind in columns.items()})

    return made


DATA_SETS = {
    each.name: each
    for each in (
        DataSet(
            "preferences",
            "compare",
            "pairs.jsonl",
            "TRL's conversational preference format, for `DPOTrainer` and `RewardTrainer`",
            _schema(
                id="text",
                prompt="messages",
                chosen="messages",
                rejected="messages",
                probability="number",
                margin="number",
                source="text",
                category="text",
                judged_by="texts",
                revised_by="texts",
                chosen_provenance="origin",
                rejected_provenance="origin",
                judge_provenance="origin",
            ),
            preference_rows,
            splits_by="reward",
        ),
        DataSet(
            "sft",
            "sft",
            "demonstrations.jsonl",
            "TRL's conversational language modelling format (`messages`), for `SFTTrainer`",
            _schema(
                id="text",
                messages="messages",
                source="text",
                revised_by="texts",
                judged_by="texts",
                p_better="number",
                provenance="origin",
                judge_provenance="origin",
            ),
            sft_rows,
        ),
        DataSet(
            "revisions",
            "revise",
            "revisions.jsonl",
            "TRL's conversational prompt-completion format, for `SFTTrainer`, with the rounds of critique and revision",
            _schema(
                id="text",
                prompt="messages",
                completion="messages",
                original="text",
                rounds="rounds",
                p_better="number",
                split="text",
                category="text",
                revised_by="texts",
                judged_by="texts",
                original_provenance="origin",
                critique_provenance="origin",
                provenance="origin",
                judge_provenance="origin",
            ),
            revision_rows,
        ),
    )
}
