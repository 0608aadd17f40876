"""evaluate: every policy answers the held-out prompts with the same seeds, and what came of it is measured.

Shares of completions that follow each checkable principle, win rate against the base model by the recipe's judge in
both orders, the reward model's mean score, KL to the SFT policy, length, variety and repetition; with 95% intervals.
Best-of-n, which trains nothing, stands beside the policies where it is asked for. One model is in memory at a time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from align.constitution.constitution import Constitution
from align.constitution.loading import load_constitution
from align.data.prompts import draw_prompts
from align.engines.engine import Completed, Engine, Request
from align.engines.provenance import PROVENANCE, Provenance, text_provenance, write_provenance
from align.errors import InputError
from align.evaluation.best_of import best_of_each, best_of_name, candidate_id, candidate_requests
from align.evaluation.overoptimisation import best_of_kl
from align.evaluation.policy_figures import constitution_used, policy_report
from align.evaluation.report import (
    BASE,
    CANDIDATES,
    REPORT,
    SAMPLES,
    EvaluatedSample,
    PolicyReport,
    Report,
    print_report,
)
from align.evaluation.verdicts import Judged, judge_samples
from align.records import Prompt, Split, read_rows, write_rows
from align.run import processes
from align.run.artefacts import write_json
from align.run.reproducibility import derive_seed
from align.run.stage import Context, Outcome, Stage
from align.run.tracking import METRICS
from align.settings.blocks import Block, EngineBlock, Integer, ModelBlock, Positive, SamplingBlock

SPLIT: Split = "eval"
REFERENCE = "sft"


class EvaluateBlock(Block):
    """What is evaluated, on how much."""

    policies: Annotated[tuple[Literal["base", "sft", "dpo", "ppo"], ...], Field(min_length=1)] = Field(
        ("base", "sft", "dpo", "ppo"), description="what is measured; base is the recipe's model"
    )
    sampling: SamplingBlock = Field(default_factory=SamplingBlock)
    limit: Positive | None = Field(None, description="at most this many held-out prompts, drawn by their content")
    reward: bool = Field(True, description="score with the reward stage's model")
    best_of: Annotated[Integer, Field(ge=2)] | None = Field(
        None,
        description="of so many completions of the SFT policy take the one of the highest reward, as one more policy",
    )
    bootstrap: Positive = Field(2000, description="resamples behind each interval")

    @field_validator("policies")
    @classmethod
    def _each_once(cls, policies: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(policies)) < len(policies):
            raise ValueError("a policy is named twice")
        return policies

    @property
    def reported(self) -> tuple[str, ...]:
        """The policies of the report: those named, and best-of-n."""
        return (*self.policies, *([best_of_name(self.best_of)] if self.best_of else []))


class Evaluate(Stage):
    """Measures every policy on the held-out prompts."""

    name = "evaluate"
    help = "measure every policy on the held-out prompts"
    settings = EvaluateBlock
    shares = ("model", "constitution", "judge")
    optional = ("constitution",)
    outputs = (REPORT, SAMPLES, CANDIDATES, PROVENANCE, METRICS)

    def inputs(self, settings: EvaluateBlock) -> tuple[str, ...]:
        trained = [policy for policy in settings.policies if policy not in (BASE, REFERENCE)]
        return ("sample", REFERENCE, *(["reward"] if settings.reward else []), *trained)

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
        constitution_path = context.shared.get("constitution")
        constitution = load_constitution(constitution_path) if constitution_path else None
        prompts, n = held_out_prompts(context), context.settings.best_of
        made: dict[str, Provenance] = {}
        samples = with_divergence(drawn_samples(context, prompts, made), context)
        candidates = drawn_candidates(context, prompts, n, made) if n else []
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


def held_out_prompts(context: Context) -> list[Prompt]:
    """The prompts of the eval split, up to the limit.

    Raises:
        InputError: there are none.
    """
    path = context.inputs["sample"] / "prompts.jsonl"
    prompts = [prompt for prompt in read_rows(path, Prompt) if prompt.split == SPLIT]
    if not prompts:
        raise InputError(f"{path}: no prompt in the split {SPLIT}; raise `prompts.split.{SPLIT}` or give more prompts")
    return draw_prompts(prompts, context.settings.limit, "held out")


def drawn_samples(context: Context, prompts: Sequence[Prompt], made: dict[str, Provenance]) -> list[EvaluatedSample]:
    """Each policy's completion of each prompt. A prompt's seed is the same for every policy.

    Args:
        made: where the entries that they name are added.
    """
    requests = _requests(context, prompts)
    samples = []
    for policy in context.settings.policies:
        done, entry = _completions(context, policy, requests, policy)
        made[entry.id] = entry
        samples += [
            _sample(policy, prompt, done[prompt.id], request.seed, entry.id)
            for prompt, request in zip(prompts, requests, strict=True)
        ]
    return samples


def drawn_candidates(
    context: Context, prompts: Sequence[Prompt], n: int, made: dict[str, Provenance]
) -> list[EvaluatedSample]:
    """The SFT policy's n completions of each prompt, which best-of-n chooses from; `made` is as for `drawn_samples`."""
    requests = candidate_requests(_requests(context, prompts), n, context.seed)
    done, entry = _completions(context, REFERENCE, requests, best_of_name(n))
    made[entry.id] = entry
    seeds = {request.id: request.seed for request in requests}
    drawn = [(prompt, candidate_id(prompt.id, number)) for prompt in prompts for number in range(n)]
    return [
        replace(
            _sample(REFERENCE, prompt, done[name], seeds[name], entry.id),
            id=f"{best_of_name(n)}/{name}",
        )
        for prompt, name in drawn
    ]


def _requests(context: Context, prompts: Sequence[Prompt]) -> list[Request]:
    sampling: SamplingBlock = context.settings.sampling
    return [
        Request(
            id=prompt.id,
            messages=prompt.prompt,
            seed=derive_seed(context.seed, "evaluate", prompt.id),
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
        )
        for prompt in prompts
    ]


def _completions(
    context: Context, policy: str, requests: Sequence[Request], name: str
) -> tuple[dict[str, Completed], Provenance]:
    """The policy's completions by the requests' ids, kept in a journal of this name, and what made them."""
    from align.evaluation.policies import policy_completions

    folder = None if policy == BASE else str(context.inputs[policy] / "model")
    journal = context.output / f"completions-{name}.journal"
    batch_size = context.settings.sampling.batch_size
    entry_of = partial(_entry, context, name)
    return policy_completions(
        folder, context.shared["model"], requests, batch_size, journal, f"{name} answers", entry_of
    )


def _entry(context: Context, name: str, engine: Engine) -> Provenance:
    return text_provenance(context, "completion", engine, EngineBlock(), writer=name)


def with_divergence(samples: Sequence[EvaluatedSample], context: Context) -> list[EvaluatedSample]:
    """The samples with the KL estimates of their policy to the SFT policy, at the temperature of sampling."""
    from align.evaluation.policies import kl_sums, measure_all, policy_logprobs

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
    from align.evaluation.policies import measure_all, reward_scores

    batch_size = context.settings.sampling.batch_size
    scores = measure_all(
        samples,
        lambda: reward_scores(context.inputs["reward"] / "model", context.shared["model"], batch_size),
        batch_size,
        context.output / "scores.journal",
        "reward scores",
    )
    return [replace(sample, score=scores[sample.id]) for sample in samples]


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
    by_policy = {name: [each for each in samples if each.policy == name] for name in settings.reported}
    bounds = {best_of_name(settings.best_of): best_of_kl(settings.best_of)} if settings.best_of else {}
    return Report(
        run=context.run_name,
        base_model=context.shared["model"].path,
        reference=REFERENCE,
        seed=context.seed,
        prompts=len(samples) // len(settings.reported),
        settings=settings.model_dump(mode="json"),
        constitution=used,
        judge=judged.judge if isinstance(judged, Judged) else None,
        judge_probes=judged.probes if isinstance(judged, Judged) else None,
        policies={
            name: policy_report(
                own,
                used.checked if used else (),
                isinstance(judged, Judged),
                seed,
                settings.bootstrap,
                kl_bound=bounds.get(name),
            )
            for name, own in by_policy.items()
        },
        skipped=skipped,
    )


def _publish(
    report: Report, samples: Sequence[EvaluatedSample], candidates: Sequence[EvaluatedSample], context: Context
) -> None:
    """Write the outputs, send the figures to the tracker, and show them."""
    from align.run.tracking import Tracker

    write_rows(context.output / SAMPLES, samples)
    if candidates:
        write_rows(context.output / CANDIDATES, candidates)
    write_json(context.output / REPORT, report.model_dump(mode="json", exclude_none=True))
    with Tracker(context.output, context.tracking, context.run_name, "evaluate") as tracker:
        tracker.truncate(-1)
        headlines = {name: _headline(policy) for name, policy in report.policies.items()}
        tracker.log(0, {f"{name}/{key}": value for name, each in headlines.items() for key, value in each.items()})
        columns = ("policy", "prompt", "completion", "score")
        rows = [(each.policy, each.prompt[-1].content, each.completion, each.score) for each in samples]
        tracker.log_table("samples", columns, rows)
    models = {name: str(context.inputs[name] / "model") for name in context.settings.policies if name != BASE}
    print_report(report, ({BASE: report.base_model} if BASE in report.policies else {}) | models)


def _headline(policy: PolicyReport) -> dict[str, float]:
    """The means alone."""
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


def _sample(policy: str, prompt: Prompt, completed: Completed, seed: int, provenance: str) -> EvaluatedSample:
    return EvaluatedSample(
        id=f"{policy}/{prompt.id}",
        prompt_id=prompt.id,
        prompt=prompt.prompt,
        category=prompt.category,
        policy=policy,
        completion=completed.text,
        finish_reason=completed.finish_reason,
        tokens=completed.tokens,
        seed=seed,
        provenance=provenance,
    )


STAGE = Evaluate()
