"""Scores that a judge gives a single completion: direct RLAIF (Lee et al. 2023, arXiv 2309.00267, section 2.3.2).

- choice: a mark from 1 to 9 by the digits' normalised probabilities, its expected value scaled to [-1, 1]. Lee et al.
  ask for 1 to 10; many tokenizers split 10 into digits, and an engine that shows the next token alone would take the
  best mark for the worst.
- contrast: the completion's mean token log-probability under the principle less that under its opposite, in nats.
- rule: the share of the rules kept.

Principles are averaged by weight. A broken hard rule costs everything: -1, or the score if that is lower.
"""

import math
from collections.abc import Mapping, Sequence

from align.constitution.principles import Principle, draw_principle
from align.engines.engine import ChoiceRequest, ChoiceScores, Engine
from align.feedback.judge import Judge, JudgeReport, broken_rule, probe_report
from align.feedback.opinions import ByChoice, ByContrast, after, choice_request, nats, option_mass
from align.records import Conversation, Message, as_dicts, digest

MARKS = tuple("123456789")
LOWEST = -1.0
Scored = tuple[Conversation, str, Principle]


class DirectScores:
    """Scores completions by a judge's constitution, each by itself. The same texts get the same score.

    Args:
        judge: of any kind; its chain of thought and worked choices are for comparisons.
        categories: of the prompts, which principles may be limited to.
        draw_seed: with a seed, one principle is drawn for each completion; None averages over all that apply.
    """

    def __init__(
        self, judge: Judge, categories: Mapping[Conversation, str] | None = None, draw_seed: int | None = None
    ) -> None:
        self.judge = judge
        self.categories = categories or {}
        self.draw_seed = draw_seed

    def __call__(self, prompts: Sequence[Conversation], completions: Sequence[str]) -> list[float | None]:
        """One score a completion; None where no principle applies, or where the judge abstained from all that do."""
        rows = list(zip(prompts, completions, strict=True))
        chosen = [self._principles(prompt, completion) for prompt, completion in rows]
        asked = [(*row, principle) for row, some in zip(rows, chosen, strict=True) for principle in some]
        scores = iter(self.scores(asked))
        return [
            self._score(row, [(principle, next(scores)) for principle in some])
            for row, some in zip(rows, chosen, strict=True)
        ]

    def scores(self, asked: Sequence[Scored]) -> list[float | None]:
        """What one principle makes of one completion; None where the judge abstains."""
        kind = self.judge.kind
        if isinstance(kind, ByContrast):
            return _contrasts(kind, asked)
        if isinstance(kind, ByChoice):
            return _marks(kind, asked)
        return [float(principle.keeps_rule(completion)) for _, completion, principle in asked]

    def _principles(self, prompt: Conversation, completion: str) -> list[Principle]:
        category = self.categories.get(prompt, "")
        if self.draw_seed is None:
            return [each for each in self.judge.principles if each.applies_to(category)]
        text = digest([as_dicts(prompt), completion])
        drawn = draw_principle(self.judge.principles, self.draw_seed, "direct", text, category=category)
        return [drawn] if drawn else []

    def _score(self, row: tuple[Conversation, str], scored: Sequence[tuple[Principle, float | None]]) -> float | None:
        prompt, completion = row
        given = [(principle.weight, score) for principle, score in scored if score is not None]
        weight = sum(weight for weight, _ in given)
        score = sum(weight * score for weight, score in given) / weight if given else None
        category = self.categories.get(prompt, "")
        hard = [each for each in self.judge.constitution.principles if each.hard and each.applies_to(category)]
        return min(score or 0.0, LOWEST) if broken_rule(hard, completion) else score


def examine_direct(scores: DirectScores) -> JudgeReport:
    """How often the judge gives the better of a principle's probes the higher score, by that principle alone."""
    asked = [
        ((Message("user", probe.prompt),), completion, principle)
        for principle in scores.judge.principles
        for probe in principle.probes
        for completion in (probe.better, probe.worse)
    ]
    given = scores.scores(asked)
    differences = [
        None if better is None or worse is None else better - worse
        for better, worse in zip(given[::2], given[1::2], strict=True)
    ]
    return probe_report(scores.judge, [principle for _, _, principle in asked[::2]], differences)


def expected_mark(logprobs: Sequence[float], min_option_mass: float) -> float | None:
    """The mean of the marks by their probabilities, scaled so that the lowest is -1 and the highest 1."""
    mass = option_mass(logprobs)
    if mass == 0 or mass < min_option_mass:
        return None
    mean = sum(number * math.exp(logprob) for number, logprob in enumerate(logprobs)) / mass
    return 2 * mean / (len(logprobs) - 1) - 1


def _marks(kind: ByChoice, asked: Sequence[Scored]) -> list[float | None]:
    requests = [_mark_request(kind, *each) for each in asked]
    scores = _answered(kind.engine, requests, kind.batch_size)
    return [expected_mark(scores[each.id].logprobs, kind.block.min_option_mass) for each in requests]


def _mark_request(kind: ByChoice, prompt: Conversation, completion: str, principle: Principle) -> ChoiceRequest:
    text = kind.frame(principle).format_mark(prompt, completion, principle.text or principle.question or "")
    before = kind.showing.before(principle, prompt, completion)
    return choice_request((Message("user", after(before, text)),), MARKS)


def _contrasts(kind: ByContrast, asked: Sequence[Scored]) -> list[float | None]:
    requests = [
        request
        for prompt, completion, principle in asked
        for request in kind.requests(principle, prompt, completion, kind.showing.before(principle, prompt, completion))
    ]
    scores = _answered(kind.engine, requests, kind.batch_size)
    means = [nats(scores[each.id].logprobs[0]) / max(scores[each.id].tokens[0], 1) for each in requests]
    values = [own - opposite for own, opposite in zip(means[::2], means[1::2], strict=True)]
    return [value if math.isfinite(value) else None for value in values]


def _answered(engine: Engine, requests: Sequence[ChoiceRequest], batch_size: int) -> dict[str, ChoiceScores]:
    """Every request's scores by its id, in chunks of a fixed order; without the journal and bar of a stage's work."""
    ordered = sorted({request.id: request for request in requests}.values(), key=_length)
    chunks = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    return {scores.id: scores for chunk in chunks for scores in engine.choice_logprobs(chunk)}


def _length(request: ChoiceRequest) -> tuple[int, str]:
    return sum(len(message.content) for message in request.messages), request.id
