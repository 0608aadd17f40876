"""A run's rows as data sets in TRL's formats, with the provenance of each row written out in full.

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
from typing import Any

from align.engines.provenance import Provenance
from align.errors import InputError
from align.feedback.records import Critique, Revision
from align.records import Demonstration, Message, PreferencePair, as_dicts, read_rows
from align.results.public_text import public_path
from align.results.published import PublishedRun
from align.stages.reward import is_held_out

SplitRow = tuple[str, dict[str, Any]]
TRAIN, TEST = "train", "test"
GENERATED_SOURCES = ("revision", "own")
"""The `source` of demonstrations that the run generated itself."""

SAMPLING_KEYS = ("temperature", "top_p", "max_new_tokens")
"""The sampling settings that have a column each; all others share the column `settings`."""


@dataclass(frozen=True)
class DataSet:
    """A data set that a run can be exported as: the stage and file that hold it, its format and its rows.

    `split_stage` is the stage that decides which rows belong to the test split.
    """

    name: str
    stage: str
    file: str
    trl_format: str
    rows: Callable[[PublishedRun], Iterator[SplitRow]]
    split_stage: str = ""


def preference_rows(run: PublishedRun) -> Iterator[SplitRow]:
    """The judge's pairs. Pairs whose prompts the reward stage holds out form the test split."""
    entries = _ProvenanceEntries(run, "compare")
    share = _held_out_share(run)
    for pair in read_rows(run.published_file("compare", "pairs.jsonl"), PreferencePair):
        columns = {
            **_fields(pair, "id", "probability", "source", "category", "judged_by", "revised_by"),
            "prompt": as_dicts(pair.prompt),
            "chosen": as_dicts(pair.chosen),
            "rejected": as_dicts(pair.rejected),
            "margin": 2 * pair.probability - 1,
            "chosen_provenance": entries.columns(pair.chosen_provenance, pair.chosen_seed),
            "rejected_provenance": entries.columns(pair.rejected_provenance, pair.rejected_seed),
            "judge_provenance": entries.columns(pair.judge_provenance),
        }
        yield TEST if is_held_out(pair.prompt, share) else TRAIN, columns


def sft_rows(run: PublishedRun) -> Iterator[SplitRow]:
    """The demonstrations that the SFT policy was trained on. Those written by people have no provenance."""
    entries = _ProvenanceEntries(run, "sft")
    for row in read_rows(run.published_file("sft", "demonstrations.jsonl"), Demonstration):
        columns = {
            **_fields(row, "id", "revised_by", "judged_by", "p_better"),
            "messages": as_dicts((*row.prompt, Message("assistant", row.completion))),
            "source": public_path(row.source),
            "provenance": entries.columns(row.provenance, row.seed),
            "judge_provenance": entries.columns(row.judge_provenance),
        }
        yield TRAIN, columns


def revision_rows(run: PublishedRun) -> Iterator[SplitRow]:
    """Accepted revisions, each with its original and every round of critique and revision."""
    entries = _ProvenanceEntries(run, "revise")
    critiques = read_rows(run.published_file("revise", "critiques.jsonl"), Critique)
    chains = groupby(critiques, key=lambda each: each.prompt_id)
    for row in read_rows(run.published_file("revise", "revisions.jsonl"), Revision):
        rounds = next((list(chain) for prompt_id, chain in chains if prompt_id == row.prompt_id), [])
        critic = next(((each.critique_provenance, each.critique_seed) for each in rounds), ("", None))
        columns = {
            **_fields(row, "id", "original", "p_better", "split", "category", "revised_by", "judged_by"),
            "prompt": as_dicts(row.prompt),
            "completion": as_dicts((Message("assistant", row.completion),)),
            "rounds": [_round(each) for each in rounds],
            "original_provenance": entries.columns(row.original_provenance, row.original_seed),
            "critique_provenance": entries.columns(*critic),
            "provenance": entries.columns(row.provenance, row.seed),
            "judge_provenance": entries.columns(row.judge_provenance),
        }
        yield TRAIN, columns


def _fields(row: object, *names: str) -> dict[str, Any]:
    """The fields of a row that become columns unchanged."""
    return {name: getattr(row, name) for name in names}


def _round(row: Critique) -> dict[str, Any]:
    texts = ("completion", "critique", "revision", "finish_reason", "critique_finish_reason")
    return {
        **_fields(row, "round", *texts, "critique_seed", "evidence", "cited"),
        "principle": row.principle_id,
        "revision_seed": row.seed,
    }


class _ProvenanceEntries:
    """The entries of a stage's `provenance.jsonl`, as columns of the rows that name them."""

    def __init__(self, run: PublishedRun, stage: str) -> None:
        self._entries = run.provenance(stage)
        self._folder = run.stage(stage)

    def columns(self, entry_id: str, seed: int | None = None) -> dict[str, Any] | None:
        """The entry that a row names, with the row's own seed; None if the row names none.

        Raises:
            InputError: the stage has no such entry.
        """
        if not entry_id:
            return None
        if entry_id not in self._entries:
            raise InputError(
                f"{self._folder}: a row names provenance {entry_id}, which is missing; remove the folder and run the "
                "stage again"
            )
        return provenance_columns(self._entries[entry_id], seed)


def provenance_columns(entry: Provenance, seed: int | None) -> dict[str, Any]:
    """An entry as columns; settings that not every engine has are one column of JSON."""
    others = {key: value for key, value in entry.settings.items() if key not in SAMPLING_KEYS}
    identity = ("model_digest", "model_revision", "verified", "precision", "constitution", "constitution_digest")
    return {
        **_fields(entry, "stage", "step", "engine", *identity),
        **{key: entry.settings.get(key) for key in SAMPLING_KEYS},
        "model": public_path(entry.model),
        "server_says": json.dumps(entry.server_says, sort_keys=True) if entry.server_says else "",
        "settings": json.dumps(others, sort_keys=True, ensure_ascii=False),
        "seed": seed,
        "recipe_seed": entry.seed,
    }


def _held_out_share(run: PublishedRun) -> float:
    """The share of prompts that the run's reward model is tested on; 0 if none was trained on the run's pairs."""
    if "reward" not in run.manifests:
        return 0.0
    settings: Mapping[str, Any] = run.manifests["reward"].settings["settings"]
    return float(settings["held_out"]) if settings["ai"] else 0.0


DATA_SETS = {
    each.name: each
    for each in (
        DataSet(
            "preferences",
            "compare",
            "pairs.jsonl",
            "TRL's conversational preference format, for `DPOTrainer` and `RewardTrainer`",
            preference_rows,
            split_stage="reward",
        ),
        DataSet(
            "sft",
            "sft",
            "demonstrations.jsonl",
            "TRL's conversational language modelling format (`messages`), for `SFTTrainer`",
            sft_rows,
        ),
        DataSet(
            "revisions",
            "revise",
            "revisions.jsonl",
            "TRL's conversational prompt-completion format, for `SFTTrainer`, with the rounds of critique and revision",
            revision_rows,
        ),
    )
}
