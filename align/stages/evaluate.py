"""evaluate: every policy answers the held-out prompts with the same seeds, and the answers are measured.

The report has, with 95% intervals: the share of completions that follow each principle with a rule, the win rate over
the base model by the recipe's judge in both orders, the reward model's mean score, KL to the SFT policy, length,
variety and repetition. Best-of-n, which trains nothing, is reported as one more policy if the recipe asks for it. Only
one model is in memory at a time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from align.constitution.constitution import Constitution
from align.constitution.loading import load_constitution
from align.data.prompts import draw_prompts
from align.engines.provenance import PROVENANCE, Provenance, write_provenance
from align.errors import InputError
from align.evaluation.best_of import best_of_each, best_of_name
from align.evaluation.overoptimisation import best_of_kl
from align.evaluation.policy_figures import constitution_used, policy_report
from align.evaluation.report import (
    BASE,
    CANDIDATES,
    KL_ROW,
    REPORT,
    SAMPLES,
    EvaluatedSample,
    PolicyReport,
    Report,
    print_report,
)
from align.evaluation.samples import (
    REFERENCE,
    draw_candidates,
    draw_samples,
    no_kl_estimate,
    reference_of,
    with_divergence,
    with_scores,
)
from align.evaluation.verdicts import Judged, judge_samples
from align.records import Prompt, Split, read_rows, write_rows
from align.run import processes
from align.run.artefacts import write_json
from align.run.reproducibility import derive_seed
from align.run.stage import Context, Outcome, Stage
from align.run.tracking import METRICS
from align.settings.blocks import Block, Integer, Positive, SamplingBlock

SPLIT: Split = "eval"


class EvaluateBlock(Block):
    """What is evaluated, and on how many prompts."""

    policies: Annotated[tuple[Literal["base", "sft", "dpo", "ppo"], ...], Field(min_length=1)] = Field(
        ("base", "sft", "dpo", "ppo"),
        description="the policies that are measured, by default those that the recipe has; base is its model",
    )
    sampling: SamplingBlock = Field(default_factory=SamplingBlock)
    limit: Positive | None = Field(None, description="at most this many held-out prompts, by a hash of their content")
    reward: bool = Field(True, description="score with the reward stage's model, if the recipe has one")
    best_of: Annotated[Integer, Field(ge=2)] | None = Field(
        None,
        description="adds best-of-n as a policy: of n completions of the SFT policy, the one with the highest reward",
    )
    bootstrap: Positive = Field(2000, description="bootstrap resamples for each interval")

    @field_validator("policies")
    @classmethod
    def _each_once(cls, policies: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(policies)) < len(policies):
            raise ValueError("a policy is named twice")
        return policies

    @property
    def reported(self) -> tuple[str, ...]:
        """The policies of the report: those of `policies`, and best-of-n."""
        return (*self.policies, *([best_of_name(self.best_of)] if self.best_of else []))


class Evaluate(Stage):
    name = "evaluate"
    help = "measure every policy on the held-out prompts"
    settings = EvaluateBlock
    shares = ("model", "constitution", "judge")
    optional = ("constitution",)
    outputs = (REPORT, SAMPLES, CANDIDATES, PROVENANCE, METRICS)

    def inputs(self, settings: EvaluateBlock) -> tuple[str, ...]:
        wanted = [policy for policy in settings.policies if policy != BASE] if _is_given(settings, "policies") else []
        return ("sample", *(["reward"] if settings.reward and _is_given(settings, "reward") else []), *wanted)

    def optional_inputs(self, settings: EvaluateBlock) -> tuple[str, ...]:
        read = [REFERENCE, *(["reward"] if settings.reward else []), *settings.policies]
        required = (BASE, *self.inputs(settings))
        return tuple(name for name in dict.fromkeys(read) if name not in required)

    def splits(self, settings: EvaluateBlock) -> tuple[Split, ...]:
        return (SPLIT,)

    def check(self, settings: EvaluateBlock, shared: Mapping[str, Any]) -> list[str]:
        if settings.best_of is None:
            return []
        faults = []
        if not settings.reward:
            faults.append(
                "evaluate.best_of: the best is chosen by the reward stage's model; set `evaluate.reward: true`"
            )
        if settings.sampling.temperature == 0:
            faults.append("evaluate.best_of: greedy completions are all alike; set `evaluate.sampling.temperature`")
        return faults

    def run(self, context: Context) -> Outcome:
        context = replace(context, settings=of_recipe(context.settings, context.inputs))
        constitution_path = context.shared.get("constitution")
        constitution = load_constitution(constitution_path) if constitution_path else None
        prompts, n = held_out_prompts(context), context.settings.best_of
        made: dict[str, Provenance] = {}
        samples = with_divergence(draw_samples(context, prompts, made), context)
        candidates = draw_candidates(context, prompts, n, made) if n else []
        if context.settings.reward:
            scored = with_scores([*samples, *candidates], context)
            samples, candidates = scored[: len(samples)], scored[len(samples) :]
        if n:
            samples += best_of_each(candidates, best_of_name(n))
        judged = judge_samples(samples, constitution, context)
        if isinstance(judged, Judged):
            samples = [judged.annotate(sample) for sample in samples]
            made[judged.provenance.id] = judged.provenance
        report = make_report(samples, constitution, judged, context)
        write_provenance(context.output, made.values())
        if processes.is_first():
            _publish(report, samples, candidates, context)
        counts = {"prompts": report.prompts, "completions": len(samples)}
        return Outcome(counts, {name: _headline(policy) for name, policy in report.policies.items()})


def _is_given(settings: EvaluateBlock, key: str) -> bool:
    """Whether the recipe itself sets a key. Without it, what the recipe does not train is not measured."""
    return key in settings.model_fields_set or (key == "reward" and settings.best_of is not None)


def of_recipe(settings: EvaluateBlock, inputs: Mapping[str, Any]) -> EvaluateBlock:
    """The settings without the policies and the reward model that the recipe does not train."""
    policies = tuple(policy for policy in settings.policies if policy == BASE or policy in inputs)
    return settings.model_copy(update={"policies": policies, "reward": settings.reward and "reward" in inputs})


def held_out_prompts(context: Context) -> list[Prompt]:
    """The prompts of the eval split, up to the limit.

    Raises:
        InputError: there are none.
    """
    path = context.inputs["sample"] / "prompts.jsonl"
    prompts = [prompt for prompt in read_rows(path, Prompt) if prompt.split == SPLIT]
    if not prompts:
        raise InputError(f"{path}: no prompt in the split {SPLIT}; raise `prompts.split.{SPLIT}` or add prompts")
    return draw_prompts(prompts, context.settings.limit, "held out")


def make_report(
    samples: Sequence[EvaluatedSample], constitution: Constitution | None, judged: Judged | str, context: Context
) -> Report:
    """The figures of every policy, and what they were measured with."""
    settings: EvaluateBlock = context.settings
    used = constitution_used(constitution) if constitution else None
    checked, is_judged = used.checked if used else (), isinstance(judged, Judged)
    skipped = {} if isinstance(judged, Judged) else {"win rate vs base": judged}
    if not settings.reward:
        skipped["reward"] = "`evaluate.reward` is off, or the recipe has no reward stage"
    if not checked:
        skipped["rule shares"] = "no principle with a rule" if used else "the recipe names no constitution"
    if reason := no_kl_estimate(settings.sampling):
        # Best-of-n has a bound in that row, so only the estimates are missing then.
        skipped["estimate of the KL" if settings.best_of else KL_ROW.format(REFERENCE)] = reason
    seed = derive_seed(context.seed, "evaluate", "bootstrap")
    by_policy = {name: [each for each in samples if each.policy == name] for name in settings.reported}
    bounds = {best_of_name(settings.best_of): best_of_kl(settings.best_of)} if settings.best_of else {}
    return Report(
        run=context.run_name,
        base_model=context.shared["model"].path,
        reference=reference_of(context),
        seed=context.seed,
        prompts=len(samples) // len(settings.reported),
        settings=settings.model_dump(mode="json"),
        constitution=used,
        judge=judged.judge if isinstance(judged, Judged) else None,
        judge_probes=judged.probes if isinstance(judged, Judged) else None,
        policies={
            name: policy_report(own, checked, is_judged, seed, settings.bootstrap, kl_bound=bounds.get(name))
            for name, own in by_policy.items()
        },
        skipped=skipped,
    )


def _publish(
    report: Report, samples: Sequence[EvaluatedSample], candidates: Sequence[EvaluatedSample], context: Context
) -> None:
    """Write the outputs, log the figures, and print the report."""
    write_rows(context.output / SAMPLES, samples)
    if candidates:
        write_rows(context.output / CANDIDATES, candidates)
    write_json(context.output / REPORT, report.model_dump(mode="json", exclude_none=True))
    with context.tracker() as tracker:
        tracker.truncate(-1)
        headlines = {name: _headline(policy) for name, policy in report.policies.items()}
        tracker.log(0, {f"{name}/{key}": value for name, each in headlines.items() for key, value in each.items()})
        columns = ("policy", "prompt", "completion", "score")
        rows = [(each.policy, each.prompt[-1].content, each.completion, each.score) for each in samples]
        tracker.log_table("samples", columns, rows)
    models = {name: str(context.inputs[name] / "model") for name in context.settings.policies if name != BASE}
    print_report(report, ({BASE: report.base_model} if BASE in report.policies else {}) | models)


def _headline(policy: PolicyReport) -> dict[str, float]:
    """A policy's means, without their intervals."""
    means = {f"rules/{name}": share.mean for name, share in policy.rules.items()}
    if policy.win_rate and policy.win_rate.share:
        means["win_rate"] = policy.win_rate.share.mean
    if policy.reward:
        means["reward"] = policy.reward.mean
    if policy.kl_to_reference_k1:
        means["kl_to_reference_k1"] = policy.kl_to_reference_k1.mean
    if policy.kl_to_reference_bound:
        means["kl_to_reference_bound"] = policy.kl_to_reference_bound
    return means | {"tokens": policy.text.mean_tokens}


STAGE = Evaluate()
