"""Pairs to judge anew, and the judge that judged them: from a run, from a file, or from constitutions' own probes."""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.constitution.constitution import Constitution
from align.data.pairs import read_pairs
from align.errors import InputError
from align.feedback.human_pairs import chosen_first
from align.feedback.records import Comparison
from align.records import Message, as_dicts, digest, read_rows
from align.results.label_changes import Pair
from align.run.artefacts import read_manifest
from align.settings.blocks import EngineBlock, JudgeBlock, ModelBlock, PairSource

CONSTITUTIONS = Path("constitutions")
"""The constitutions that the project ships, from its root."""
COMPARE = "compare"
COMPARISONS = "comparisons.jsonl"


@dataclass(frozen=True)
class JudgeSettings:
    """A judge, the model that its engine falls back on, and whether it draws one principle for each pair."""

    block: JudgeBlock
    model: ModelBlock | None = None
    draws: bool = False

    @property
    def by_chance(self) -> bool:
        """Whether another seed may give other labels: principles, chains of thought or worked choices are drawn."""
        block = self.block
        reasons = block.chain_of_thought and block.reasoning.temperature > 0
        return self.draws or (block.kind == "choice" and (reasons or block.examples > 0))


def compare_folder(run: Path) -> Path:
    """A run's `compare` folder, from the run or from that folder itself.

    Raises:
        InputError: neither holds comparisons.
    """
    for folder in (run / COMPARE, run):
        if (folder / COMPARISONS).is_file():
            return folder
    raise InputError(f"{run}: no {COMPARE}/{COMPARISONS} in it; name a run whose `compare` is done, or a file of pairs")


def pairs_of(path: Path) -> list[Pair]:
    """The pairs of a run (those that its judge was asked about), of a comparisons.jsonl, or of a file of preferences.

    Raises:
        InputError: there is no such file or run, or no pair in it.
    """
    if path.is_dir():
        return _compared(compare_folder(path) / COMPARISONS)
    return _compared(path) if path.name == COMPARISONS else preferred_pairs(path)


def preferred_pairs(path: Path) -> list[Pair]:
    """Pairs in TRL's format, the preferred completion first in half of them."""
    found = []
    for pair in read_pairs(PairSource(path=str(path))):
        chosen, rejected = pair.chosen[-1].content, pair.rejected[-1].content
        first = chosen_first(pair)
        a, b = (chosen, rejected) if first else (rejected, chosen)
        prompt_id = digest(as_dicts(pair.prompt))
        found.append(Pair(pair.id, prompt_id, pair.prompt, a, b, pair.category, first))
    return found


def probe_pairs(constitutions: Iterable[Constitution]) -> list[Pair]:
    """Every probe of the constitutions as a pair, each once, the better completion first.

    Its prompt is of the first category that its principle applies to, or that principle would not judge it.
    """
    pairs: dict[str, Pair] = {}
    for principle in (each for constitution in constitutions for each in constitution.principles):
        for probe in principle.probes:
            prompt = (Message("user", probe.prompt),)
            pair_id = digest([probe.prompt, *sorted((probe.better, probe.worse))])
            category = next(iter(principle.applies), "")
            pair = Pair(pair_id, digest(as_dicts(prompt)), prompt, probe.better, probe.worse, category)
            pairs.setdefault(pair_id, pair)
    return list(pairs.values())


def drawn_pairs(pairs: Sequence[Pair], limit: int) -> list[Pair]:
    """At most `limit` pairs: those whose content hashes lowest, in the order they came in."""
    chosen = heapq.nsmallest(limit, range(len(pairs)), key=lambda place: digest([pairs[place].id]))
    return [pairs[place] for place in sorted(chosen)]


def judge_of_run(run: Path) -> JudgeSettings:
    """The judge that labelled a run's comparisons.

    Raises:
        InputError: the run's `compare` is not done, or was made by another version.
    """
    folder = compare_folder(run)
    manifest = read_manifest(folder)
    if manifest is None:
        raise InputError(f"{folder}: no manifest, so `compare` is not done; run it, or name the judge with --judge")
    settings = manifest.settings
    return JudgeSettings(
        JudgeBlock.model_validate(settings["judge"]),
        ModelBlock.model_validate(settings["model"]),
        settings["settings"].get("principle") == "draw",
    )


def named_judge(kind: str | None, model: str | None, like: JudgeSettings | None) -> JudgeSettings:
    """The judge `like` with what the command line changes of it; by rule where nothing is said at all.

    Raises:
        InputError: a model is needed and none is named.
    """
    like = like or JudgeSettings(JudgeBlock(kind="rule"))
    changes: dict[str, Any] = {"kind": kind} if kind else {}
    if model:
        changes["engine"] = EngineBlock(model=model)
        changes["kind"] = kind or ("contrast" if like.block.kind == "rule" else like.block.kind)
    block = like.block.model_copy(update=changes)
    if block.kind != "rule" and like.model is None and block.engine.model is None:
        raise InputError(f"a judge by {block.kind} asks a model; name it with --judge-model, or a recipe with --recipe")
    return JudgeSettings(block, like.model or ModelBlock(path=block.engine.model or "none"), like.draws)


def _compared(path: Path) -> list[Pair]:
    rows = [row for row in read_rows(path, Comparison) if row.judge]
    if not rows:
        raise InputError(f"{path}: no comparison that a judge was asked about; name another run or a file of pairs")
    return [Pair(row.id, row.prompt_id, row.prompt, row.completion_a, row.completion_b, row.category) for row in rows]
