"""Comparisons of an engine's completions of the same prompt, and the judge's verdicts on them."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from align.engines.complete_all import complete_all
from align.engines.engine import Completed, Engine, Request
from align.feedback.judge import Judge
from align.feedback.preference_pairs import question_of, with_verdict
from align.feedback.records import Comparison, OpinionScores
from align.records import Prompt, digest
from align.run.reproducibility import derive_seed
from align.run.streaming import Window
from align.settings.blocks import SamplingBlock


def draw_comparisons(
    window: Window[Prompt], engine: Engine, sampling: SamplingBlock, completions: int, seed: int
) -> list[Comparison]:
    """Every pair of a prompt's `completions` completions, for each prompt, not judged yet.

    A comparison that is not worth judging has a `reason`.
    """
    how = (sampling.max_new_tokens, sampling.temperature, sampling.top_p)
    requests = [
        Request(f"{prompt.id}/{number}", prompt.prompt, derive_seed(seed, prompt.id, number), *how)
        for prompt in window.rows
        for number in range(completions)
    ]
    journal = window.folder / "completions.journal"
    progress = f"{'two' if completions == 2 else completions} answers per prompt{window.label}"
    completed = complete_all(engine, requests, sampling.batch_size, journal, progress)
    pairs = list(itertools.combinations(range(completions), 2))
    return [_comparison(prompt, pair, completed, seed) for prompt in window.rows for pair in pairs]


def judge_comparisons(
    comparisons: Sequence[Comparison], judge: Judge, journal_path: Path, description: str
) -> list[tuple[Comparison, tuple[OpinionScores, ...]]]:
    """The comparisons with the judge's verdicts, each with the scores behind its verdict."""
    judged = [row for row in comparisons if not row.reason]
    answers = judge.compare([question_of(row) for row in judged], journal_path, description)
    verdicts = {row.id: verdict for row, verdict in zip(judged, answers, strict=True)}
    return [
        (with_verdict(row, verdict, judge.name), verdict.scores) if (verdict := verdicts.get(row.id)) else (row, ())
        for row in comparisons
    ]


def _comparison(prompt: Prompt, numbers: tuple[int, int], completed: Mapping[str, Completed], seed: int) -> Comparison:
    a, b = (completed[f"{prompt.id}/{number}"] for number in numbers)
    return Comparison(
        id=digest([prompt.id, "comparison", *numbers]),
        prompt_id=prompt.id,
        prompt=prompt.prompt,
        completion_a=a.text.strip(),
        completion_b=b.text.strip(),
        p_a=None,
        reason=_not_worth_judging(a, b),
        category=prompt.category,
        seed_a=derive_seed(seed, prompt.id, numbers[0]),
        seed_b=derive_seed(seed, prompt.id, numbers[1]),
    )


def _not_worth_judging(a: Completed, b: Completed) -> str:
    """The reason why two completions are not judged; empty if they are."""
    if a.refused or b.refused:
        return "refused"
    if "length" in (a.finish_reason, b.finish_reason):
        return "cut"
    if not a.text.strip() or not b.text.strip():
        return "empty"
    return "identical" if a.text.strip() == b.text.strip() else ""
