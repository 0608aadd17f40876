"""Pairs for a judge to label (from a run, a file, or constitutions' probes), and the settings of that judge."""

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
from align.records import Conversation, Message, as_dicts, digest, read_rows
from align.run.artefacts import Manifest, read_manifest
from align.settings.blocks import EngineBlock, JudgeBlock, ModelBlock
from align.settings.data import PairSource

CONSTITUTIONS = Path("constitutions")
"""The constitutions shipped with the project, relative to its root."""
COMPARE = "compare"
COMPARISONS = "comparisons.jsonl"


@dataclass(frozen=True)
class Pair:
    """Two completions of a prompt. `prompt_id` groups the pairs of one prompt; `a_preferred`: people preferred A."""

    id: str
    prompt_id: str
    prompt: Conversation
    a: str
    b: str
    category: str = ""
    a_preferred: bool | None = None


@dataclass(frozen=True)
class JudgeSettings:
    """A judge, the model that its engine uses by default, and whether it draws one principle for each pair."""

    block: JudgeBlock
    model: ModelBlock | None = None
    draws_principle: bool = False

    @property
    def depends_on_seed(self) -> bool:
        """Whether another seed may give other labels: principles, chains of thought or worked choices are drawn."""
        block = self.block
        reasons = block.chain_of_thought and block.reasoning.temperature > 0
        return self.draws_principle or (block.kind == "choice" and (reasons or block.examples > 0))


def compare_folder(run: Path) -> Path:
    """A run's `compare` folder, given the run's folder or that folder itself.

    Raises:
        InputError: neither holds comparisons.
    """
    for folder in (run / COMPARE, run):
        if (folder / COMPARISONS).is_file():
            return folder
    raise InputError(f"{run}: no {COMPARE}/{COMPARISONS} in it; name a run whose `compare` is done, or a file of pairs")


def pairs_of(path: Path) -> list[Pair]:
    """The pairs that a run's judge was asked about, or those in a comparisons.jsonl or a file of preferences.

    Raises:
        InputError: there is no such file or run, or no pair in it.
    """
    if path.is_dir():
        return _compared_pairs(compare_folder(path) / COMPARISONS)
    return _compared_pairs(path) if path.name == COMPARISONS else preference_pairs(path)


def preference_pairs(path: Path) -> list[Pair]:
    """Pairs from a file in TRL's preference format. In about half of them the preferred completion comes first."""
    found = []
    for pair in read_pairs(PairSource(path=str(path))):
        chosen, rejected = pair.chosen[-1].content, pair.rejected[-1].content
        first = chosen_first(pair)
        a, b = (chosen, rejected) if first else (rejected, chosen)
        prompt_id = digest(as_dicts(pair.prompt))
        found.append(Pair(pair.id, prompt_id, pair.prompt, a, b, pair.category, first))
    return found


def probe_pairs(constitutions: Iterable[Constitution]) -> list[Pair]:
    """Every distinct probe of the constitutions as a pair, the better completion first.

    The pair's category is the first that the probe's principle applies to; otherwise the principle would not judge it.
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
    """At most `limit` pairs, those with the lowest hash of their id, in the order given."""
    chosen = heapq.nsmallest(limit, range(len(pairs)), key=lambda place: digest([pairs[place].id]))
    return [pairs[place] for place in sorted(chosen)]


def judge_of_run(run: Path) -> JudgeSettings:
    """The judge that labelled a run's comparisons.

    Raises:
        InputError: the run's `compare` is not done.
    """
    folder = compare_folder(run)
    manifest = read_manifest(folder)
    if manifest is None:
        raise InputError(f"{folder}: no manifest, so `compare` is not done; run it, or name the judge with --judge")
    return judge_in(manifest)


def judge_in(manifest: Manifest) -> JudgeSettings:
    """The judge that a `compare` manifest records; the default judge if it records none, as in early versions."""
    settings = manifest.settings
    return JudgeSettings(
        JudgeBlock.model_validate(settings.get("judge", {})),
        ModelBlock.model_validate(settings["model"]) if "model" in settings else None,
        settings.get("settings", {}).get("principle") == "draw",
    )


def judge_from_options(kind: str | None, model: str | None, default: JudgeSettings | None) -> JudgeSettings:
    """The default judge (a `rule` judge if None) with the kind and model that the command line names.

    Raises:
        InputError: the judge needs a model and none is named.
    """
    default = default or JudgeSettings(JudgeBlock(kind="rule"))
    changes: dict[str, Any] = {"kind": kind} if kind else {}
    if model:
        changes["engine"] = EngineBlock(model=model)
        changes["kind"] = kind or ("contrast" if default.block.kind == "rule" else default.block.kind)
    block = default.block.model_copy(update=changes)
    if block.kind != "rule" and default.model is None and block.engine.model is None:
        raise InputError(f"a `{block.kind}` judge needs a model; name it with --judge-model, or a recipe with --recipe")
    return JudgeSettings(block, default.model or ModelBlock(path=block.engine.model or "none"), default.draws_principle)


def _compared_pairs(path: Path) -> list[Pair]:
    rows = [row for row in read_rows(path, Comparison) if row.judge]
    if not rows:
        raise InputError(f"{path}: its judge was asked about no comparison; name another run or a file of pairs")
    return [Pair(row.id, row.prompt_id, row.prompt, row.completion_a, row.completion_b, row.category) for row in rows]
