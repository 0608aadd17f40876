"""evaluate: every policy answers the held-out prompts with the same seeds, and what came of it is measured.

Shares of completions that follow each checkable principle, win rate against the base model by the recipe's judge in
both orders, the reward model's mean score, KL to the SFT policy, length, variety and repetition; with 95% intervals.
One model is in memory at a time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from align import processes
from align.artefacts import write_json
from align.config import Block, EngineBlock, ModelBlock, Positive, SamplingBlock
from align.constitution import Constitution, load_constitution
from align.data.prompts import drawn_prompts
from align.errors import InputError
from align.generation import Completed, Request
from align.policy_figures import TIED, constitution_used, policy_report
from align.records import Prompt, read_rows, write_rows
from align.report import (
    BASE,
    REPORT,
    SAMPLES,
    EvaluatedSample,
    PolicyReport,
    Report,
    print_report,
)
from align.repro import derive_seed
from align.stage import Context, Outcome, Stage
from align.statistics import Estimate
from align.tracking import METRICS

SPLIT = "eval"
REFERENCE = "sft"


class EvaluateBlock(Block):
    """What is evaluated, on how much."""

    policies: Annotated[tuple[Literal["base", "sft", "dpo", "ppo"], ...], Field(min_length=1)] = Field(
        ("base", "sft", "dpo", "ppo"), description="what is measured; base is the recipe's model"
    )
    sampling: SamplingBlock = Field(default_factory=SamplingBlock)
    limit: Positive | None = Field(None, description="at most this many held-out prompts, drawn by their content")
    reward: bool = Field(True, description="score with the reward stage's model")
    bootstrap: Positive = Field(2000, description="resamples behind each interval")

    @field_validator("policies")
    @classmethod
    def _each_once(cls, policies: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(policies)) < len(policies):
            raise ValueError("a policy is named twice")
        return policies


@dataclass(frozen=True)
class Judged:
    """Who judged, and its probability that each sample is better than the base model's (by id; None: it abstained)."""

    judge: str
    probes: Estimate | None
    p_better: Mapping[str, float | None]


class Evaluate(Stage):
    """Measures every policy on the held-out prompts."""

    name = "evaluate"
    help = "measure every policy on the held-out prompts"
    settings = EvaluateBlock
    shares = ("model", "constitution", "judge")
    optional = ("constitution",)
    outputs = (REPORT, SAMPLES, METRICS)

    def inputs(self, settings: EvaluateBlock) -> tuple[str, ...]:
        trained = [policy for policy in settings.policies if policy not in (BASE, REFERENCE)]
        return ("sample", REFERENCE, *(["reward"] if settings.reward else []), *trained)

    def run(self, context: Context) -> Outcome:
        constitution_path = context.shared.get("constitution")
        constitution = load_constitution(constitution_path) if constitution_path else None
        samples = with_divergence(drawn_samples(context, held_out_prompts(context)), context)
        if context.settings.reward:
            samples = with_scores(samples, context)
        judged = judge_samples(samples, constitution, context)
        if isinstance(judged, Judged):
            samples = [replace(sample, p_better=judged.p_better.get(sample.id)) for sample in samples]
        report = make_report(samples, constitution, judged, context)
        if processes.is_first():
            _publish(report, samples, context)
        counts = {"prompts": report.prompts, "completions": len(samples)}
        return Outcome(counts, {name: _headline(policy) for name, policy in report.policies.items()})


def held_out_prompts(context: Context) -> list[Prompt]:
    """The prompts of the eval split, up to the limit.

    Raises:
        InputError: there are none.
    """
    path = context.inputs["sample"] / "prompts.jsonl"
    prompts = [prompt for prompt in read_rows(path, Prompt) if prompt.split == SPLIT]
    if not prompts:
        raise InputError(f"{path}: no prompt in the split {SPLIT}; raise `prompts.split.{SPLIT}` or give more prompts")
    return drawn_prompts(prompts, context.settings.limit, "held out")


def drawn_samples(context: Context, prompts: Sequence[Prompt]) -> list[EvaluatedSample]:
    """Each policy's completion of each prompt. A prompt's seed is the same for every policy."""
    from align.backends.complete_all import complete_all
    from align.backends.open import open_backend
    from align.evaluation import release_memory

    sampling: SamplingBlock = context.settings.sampling
    requests = [_request(prompt, sampling, derive_seed(context.seed, "evaluate", prompt.id)) for prompt in prompts]
    samples = []
    for policy in context.settings.policies:
        folder = None if policy == BASE else str(context.inputs[policy] / "model")
        done = complete_all(
            open_backend(EngineBlock(), context.shared["model"], path=folder),
            requests,
            sampling.batch_size,
            context.output / f"completions-{policy}.journal",
            f"{policy} answers",
        )
        samples += [_sample(policy, prompt, done[prompt.id]) for prompt in prompts]
        release_memory()
    return samples


def with_divergence(samples: Sequence[EvaluatedSample], context: Context) -> list[EvaluatedSample]:
    """The samples with the KL estimates of their policy to the SFT policy, at the temperature of sampling."""
    from align.evaluation import kl_sums, measure_all, policy_logprobs

    block: ModelBlock = context.shared["model"]
    sampling: SamplingBlock = context.settings.sampling

    def logprobs(of: Sequence[EvaluatedSample], under: str, name: str) -> dict[str, Any]:
        path, revision = str(context.inputs.get(under, Path()) / "model"), None
        if under == BASE:
            path, revision = block.path, block.revision
        load = partial(policy_logprobs, path, block, sampling.temperature, revision)
        journal = context.output / f"logprobs-{name}.journal"
        return measure_all(of, load, sampling.batch_size, journal, f"log-probs of {name}")

    others = [sample for sample in samples if sample.policy != REFERENCE]
    own: dict[str, Any] = {}
    for policy in dict.fromkeys(sample.policy for sample in others):
        own |= logprobs([sample for sample in others if sample.policy == policy], policy, policy)
    reference = logprobs(others, REFERENCE, "reference") if others else {}
    divergence = {sample.id: kl_sums(own[sample.id], reference[sample.id]) for sample in others}
    return [
        replace(sample, kl_to_reference_k1=k1, kl_to_reference_k3=k3)
        for sample in samples
        for k1, k3 in [divergence.get(sample.id, (0.0, 0.0))]
    ]


def with_scores(samples: Sequence[EvaluatedSample], context: Context) -> list[EvaluatedSample]:
    """The samples with the reward model's scores."""
    from align.evaluation import measure_all, reward_scores

    batch_size = context.settings.sampling.batch_size
    scores = measure_all(
        samples,
        lambda: reward_scores(context.inputs["reward"] / "model", context.shared["model"], batch_size),
        batch_size,
        context.output / "scores.journal",
        "reward scores",
    )
    return [replace(sample, score=scores[sample.id]) for sample in samples]


def judge_samples(
    samples: Sequence[EvaluatedSample], constitution: Constitution | None, context: Context
) -> Judged | str:
    """The judge's verdicts on every sample against the base model's; where there can be none, why not."""
    from align.feedback.judge import examine_judge, judge_problems, open_judge

    block = context.shared.get("judge")
    policies = context.settings.policies
    if constitution is None or block is None:
        return "the recipe names no constitution" if constitution is None else "the recipe names no judge"
    if BASE not in policies or len(policies) == 1:
        return "`evaluate.policies` needs base and another one for it"
    if problems := judge_problems(constitution, block):
        return problems[0]
    judge = open_judge(block, context.shared["model"], constitution)
    found = examine_judge(judge, context.output / "probes.journal")
    if block.kind != "rule" and not block.allow_chance and found.low <= 0.5:
        return f"judge {judge.name} is not shown to be better than chance ({found})"
    probes = Estimate(found.accuracy, found.low, found.high, found.n) if found.n else None
    return Judged(judge.name, probes, _verdicts(judge, samples, context.output / "verdicts.journal"))


def _verdicts(judge: Any, samples: Sequence[EvaluatedSample], journal_path: Path) -> dict[str, float | None]:
    from align.feedback.judge import BOTH_BREAK, TIE
    from align.feedback.opinions import Question

    base = {sample.prompt_id: sample.completion for sample in samples if sample.policy == BASE}
    others = [sample for sample in samples if sample.policy != BASE]
    unlike = [sample for sample in others if sample.completion.strip() != base[sample.prompt_id].strip()]
    questions = [
        Question(sample.id, sample.prompt, sample.completion, base[sample.prompt_id], sample.category)
        for sample in unlike
    ]
    found: dict[str, float | None] = {sample.id: TIED for sample in others}
    for sample, verdict in zip(unlike, judge.compare(questions, journal_path, "judge"), strict=True):
        tied = verdict.p_a is None and verdict.reason.startswith((TIE, BOTH_BREAK))
        found[sample.id] = TIED if tied else verdict.p_a
    return found


def make_report(
    samples: Sequence[EvaluatedSample], constitution: Constitution | None, judged: Judged | str, context: Context
) -> Report:
    """The figures of every policy, and what they were measured with."""
    settings: EvaluateBlock = context.settings
    used = constitution_used(constitution) if constitution else None
    skipped = {} if isinstance(judged, Judged) else {"win rate vs base": judged}
    if not settings.reward:
        skipped["reward"] = "`evaluate.reward` is off"
    if used is None or not used.checked:
        skipped["rule shares"] = "no principle with a rule" if used else "the recipe names no constitution"
    seed = derive_seed(context.seed, "evaluate", "bootstrap")
    by_policy = {name: [each for each in samples if each.policy == name] for name in settings.policies}
    return Report(
        run=context.run_name,
        base_model=context.shared["model"].path,
        reference=REFERENCE,
        seed=context.seed,
        prompts=len(samples) // len(settings.policies),
        settings=settings.model_dump(mode="json"),
        constitution=used,
        judge=judged.judge if isinstance(judged, Judged) else None,
        judge_probes=judged.probes if isinstance(judged, Judged) else None,
        policies={
            name: policy_report(own, used.checked if used else (), isinstance(judged, Judged), seed, settings.bootstrap)
            for name, own in by_policy.items()
        },
        skipped=skipped,
    )


def _publish(report: Report, samples: Sequence[EvaluatedSample], context: Context) -> None:
    """Write both outputs, send the figures to the tracker, and show them."""
    from align.tracking import Tracker

    write_rows(context.output / SAMPLES, samples)
    write_json(context.output / REPORT, report.model_dump(mode="json", exclude_none=True))
    with Tracker(context.output, context.tracking, context.run_name, "evaluate") as tracker:
        tracker.truncate(-1)
        headlines = {name: _headline(policy) for name, policy in report.policies.items()}
        tracker.log(0, {f"{name}/{key}": value for name, each in headlines.items() for key, value in each.items()})
        columns = ("policy", "prompt", "completion", "score")
        rows = [(each.policy, each.prompt[-1].content, each.completion, each.score) for each in samples]
        tracker.log_table("samples", columns, rows)
    models = {policy: str(context.inputs[policy] / "model") for policy in report.policies if policy != BASE}
    print_report(report, ({BASE: report.base_model} if BASE in report.policies else {}) | models)


def _headline(policy: PolicyReport) -> dict[str, float]:
    """The means alone."""
    means = {f"rules/{name}": share.mean for name, share in policy.rules.items()}
    if policy.win_rate and policy.win_rate.share:
        means["win_rate"] = policy.win_rate.share.mean
    if policy.reward:
        means["reward"] = policy.reward.mean
    return means | {"kl_to_reference_k1": policy.kl_to_reference_k1.mean, "tokens": policy.text.mean_tokens}


def _request(prompt: Prompt, sampling: SamplingBlock, seed: int) -> Request:
    return Request(
        id=prompt.id,
        messages=prompt.prompt,
        seed=seed,
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
    )


def _sample(policy: str, prompt: Prompt, completed: Completed) -> EvaluatedSample:
    return EvaluatedSample(
        id=f"{policy}/{prompt.id}",
        prompt_id=prompt.id,
        prompt=prompt.prompt,
        category=prompt.category,
        policy=policy,
        completion=completed.text,
        finish_reason=completed.finish_reason,
        tokens=completed.tokens,
    )


STAGE = Evaluate()
