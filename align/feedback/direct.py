"""Scores single completions with a judge: direct RLAIF (Lee et al. 2023, arXiv 2309.00267, section 2.3.2).

- choice: asks for a mark from 1 to 9. The score is the expected mark under the digits' normalised probabilities, scaled
  to [-1, 1]. Lee et al. ask for 1 to 10, but many tokenizers split 10 into digits, and an engine that returns only the
  next token would take the best mark for the worst.
- contrast: the completion's mean token log-probability under the principle minus that under its opposite, in nats.
- rule: 1 if the rule is kept, else 0.

The scores of the principles are averaged by weight. A broken hard rule makes the score -1, unless it is lower already.
"""

import math
from collections.abc import Mapping, Sequence

from align.constitution.principles import Principle
from align.engines.engine import ChoiceRequest, ChoiceScores
from align.feedback.choice_judge import ChoiceJudge
from align.feedback.contrast_judge import ContrastJudge
from align.feedback.evidence import join_paragraphs
from align.feedback.judge import Judge, broken_hard_rule, principles_for
from align.feedback.opinions import EngineJudge, choice_request, mean_token_logprob, option_mass
from align.feedback.probes import ProbeReport, probe_report
from align.records import Conversation, Message, as_dicts, digest

MARKS = tuple("123456789")
LOWEST = -1.0
Asked = tuple[Conversation, str, Principle]
"""A prompt, its completion and the principle to score it by."""


class DirectScorer:
    """Scores each completion by itself, by a judge's constitution. Equal texts get equal scores.

    Args:
        judge: of any kind. Chain of thought and worked comparisons are not used.
        categories: the category of each prompt, to which principles may be limited.
        draw_seed: with a seed, one applicable principle is drawn for each completion. None averages over all of them.
    """

    def __init__(
        self, judge: Judge, categories: Mapping[Conversation, str] | None = None, draw_seed: int | None = None
    ) -> None:
        self.judge = judge
        self.categories = categories or {}
        self.draw_seed = draw_seed

    def __call__(self, prompts: Sequence[Conversation], completions: Sequence[str]) -> list[float | None]:
        """One score per completion; None if no principle applies, or the judge abstains from all that do."""
        rows = list(zip(prompts, completions, strict=True))
        chosen = [self._principles(prompt, completion) for prompt, completion in rows]
        asked = [(*row, principle) for row, some in zip(rows, chosen, strict=True) for principle in some]
        scores = iter(self.scores(asked))
        return [
            self._score(row, [(principle, next(scores)) for principle in some])
            for row, some in zip(rows, chosen, strict=True)
        ]

    def scores(self, asked: Sequence[Asked]) -> list[float | None]:
        """The score of each completion by its one principle; None where the judge abstains."""
        kind = self.judge.kind
        if isinstance(kind, ContrastJudge):
            return _contrasts(kind, asked)
        if isinstance(kind, ChoiceJudge):
            return _marks(kind, asked)
        return [float(principle.keeps_rule(completion)) for _, completion, principle in asked]

    def _principles(self, prompt: Conversation, completion: str) -> list[Principle]:
        text = digest([as_dicts(prompt), completion])
        return principles_for(self.judge.principles, self.categories.get(prompt, ""), self.draw_seed, "direct", text)

    def _score(self, row: tuple[Conversation, str], scored: Sequence[tuple[Principle, float | None]]) -> float | None:
        prompt, completion = row
        given = [(principle.weight, score) for principle, score in scored if score is not None]
        weight = sum(weight for weight, _ in given)
        score = sum(weight * score for weight, score in given) / weight if given else None
        broken = broken_hard_rule(self.judge.constitution, self.categories.get(prompt, ""), completion)
        return min(score or 0.0, LOWEST) if broken else score


def examine_direct(scorer: DirectScorer) -> ProbeReport:
    """How often the judge scores the better completion of a principle's probes higher, by that principle alone."""
    asked = [
        ((Message("user", probe.prompt),), completion, principle)
        for principle in scorer.judge.principles
        for probe in principle.probes
        for completion in (probe.better, probe.worse)
    ]
    given = scorer.scores(asked)
    differences = [
        None if better is None or worse is None else better - worse
        for better, worse in zip(given[::2], given[1::2], strict=True)
    ]
    return probe_report(scorer.judge, [principle for _, _, principle in asked[::2]], differences)


def expected_mark(logprobs: Sequence[float], min_option_mass: float) -> float | None:
    """The expected mark, scaled so that the lowest is -1 and the highest 1; None if the marks have too little mass."""
    mass = option_mass(logprobs)
    if mass == 0 or mass < min_option_mass:
        return None
    mean = sum(number * math.exp(logprob) for number, logprob in enumerate(logprobs)) / mass
    return 2 * mean / (len(logprobs) - 1) - 1


def _marks(kind: ChoiceJudge, asked: Sequence[Asked]) -> list[float | None]:
    requests = []
    for prompt, completion, principle in asked:
        text = kind.template(principle).format_mark(prompt, completion, principle.text or principle.question or "")
        passages = kind.context.quoted_passages(principle, prompt, completion)
        requests.append(choice_request((Message("user", join_paragraphs(passages, text)),), MARKS))
    scores = _choice_scores(kind, requests)
    return [expected_mark(scores[each.id].logprobs, kind.settings.min_option_mass) for each in requests]


def _contrasts(kind: ContrastJudge, asked: Sequence[Asked]) -> list[float | None]:
    requests: list[ChoiceRequest] = []
    for prompt, completion, principle in asked:
        passages = kind.context.quoted_passages(principle, prompt, completion)
        requests += kind.requests(principle, prompt, completion, passages)
    scores = _choice_scores(kind, requests)
    means = [mean_token_logprob(scores[each.id]) for each in requests]
    values = [own - opposite for own, opposite in zip(means[::2], means[1::2], strict=True)]
    return [value if math.isfinite(value) else None for value in values]


def _choice_scores(kind: EngineJudge, requests: Sequence[ChoiceRequest]) -> dict[str, ChoiceScores]:
    """The scores by request id, in chunks of a fixed order. Keeps no journal and shows no progress bar."""
    ordered = sorted(
        {request.id: request for request in requests}.values(),
        key=lambda request: (sum(len(message.content) for message in request.messages), request.id),
    )
    size = kind.settings.batch_size
    chunks = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    return {scores.id: scores for chunk in chunks for scores in kind.engine.choice_logprobs(chunk)}
