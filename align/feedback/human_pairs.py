"""Tests whether a judge prefers what people prefer, on pairs that people labelled, before it labels any pair itself."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.errors import JudgeAtChance
from align.feedback.calibration import JudgedPair
from align.feedback.judge import Judge, Verdict
from align.feedback.opinions import Question
from align.records import PreferencePair, as_dicts, digest


def judge_pairs(judge: Judge, pairs: Sequence[PreferencePair], journal_path: Path | None = None) -> list[JudgedPair]:
    """The judge's verdict on each pair, in order, in every process. A hash of the pair decides which completion is A.

    Finished scores are kept in `journal_path.<rank>`, and an interrupted call resumes from them.
    """
    verdicts = judge.compare([_question(pair) for pair in pairs], journal_path, "human pairs")
    return [_judged(pair, verdict) for pair, verdict in zip(pairs, verdicts, strict=True)]


def require_agreement(judge: Judge, figures: Mapping[str, Any], min_accuracy: float = 0.5) -> None:
    """Stop a judge that is not shown to agree with people more often than `min_accuracy` before it labels.

    This tests rule judges too: their probes always agree with their rules, but human pairs need not.

    Raises:
        JudgeAtChance: the accuracy's interval does not lie above `min_accuracy`, and the recipe does not allow that.
    """
    found = figures["accuracy"]
    if judge.settings.allow_chance or found["low"] > min_accuracy:
        return
    level = "chance" if min_accuracy == 0.5 else f"`min_accuracy` {min_accuracy:.0%}"
    raise JudgeAtChance(
        f"judge {judge.name} with constitution '{judge.constitution.id}' prefers what people prefer in "
        f"{found['mean']:.0%} of the {found['n']} pairs that it decided (of {figures['pairs']}), 95% interval "
        f"{found['low']:.0%} to {found['high']:.0%}, which does not lie above {level}. Choose another `judge.kind`, a "
        "stronger model with `judge.engine.model`, other principles, or more pairs; set `judge.allow_chance: true` to "
        "label anyway"
    )


def _question(pair: PreferencePair) -> Question:
    chosen, rejected = pair.chosen[-1].content, pair.rejected[-1].content
    a, b = (chosen, rejected) if chosen_first(pair) else (rejected, chosen)
    return Question(pair.id, pair.prompt, a, b, pair.category)


def _judged(pair: PreferencePair, verdict: Verdict) -> JudgedPair:
    first = chosen_first(pair)
    return JudgedPair(
        id=pair.id,
        prompt_id=digest(as_dicts(pair.prompt)),
        label=pair.probability,
        p_chosen=None if verdict.p_a is None else _p_chosen(verdict.p_a, first),
        chosen_first=first,
        chosen_characters=len(pair.chosen[-1].content),
        rejected_characters=len(pair.rejected[-1].content),
        p_by_principle={name: _p_chosen(p, first) for name, p in verdict.by_principle.items()},
        position_bias=verdict.position_bias,
        same_place=verdict.same_place,
        reason=verdict.reason,
        source=pair.source,
        category=pair.category,
    )


def chosen_first(pair: PreferencePair) -> bool:
    """Whether the judge sees the preferred completion as A. A hash of the pair decides, to favour neither position."""
    return int(digest(["chosen first", pair.id], 8), 16) % 2 == 0


def _p_chosen(p_a: float, chosen_first: bool) -> float:
    return p_a if chosen_first else 1 - p_a
