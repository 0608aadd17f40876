"""The completions that are evaluated: each policy's answers, with KL estimates and reward scores."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from align.engines.engine import Completed, Engine, Request
from align.engines.provenance import Provenance, text_provenance
from align.evaluation.best_of import best_of_name, candidate_id, candidate_requests
from align.evaluation.policies import kl_sums, measure_all, policy_completions, policy_logprobs, reward_scores
from align.evaluation.report import BASE, EvaluatedSample
from align.records import Prompt
from align.run.reproducibility import derive_seed
from align.run.stage import Context
from align.settings.blocks import EngineBlock, ModelBlock, SamplingBlock

REFERENCE = "sft"


def reference_of(context: Context) -> str:
    """The policy that KL is measured from, and best-of-n chooses from: sft's, or without that stage the base model."""
    return REFERENCE if REFERENCE in context.inputs else BASE


def draw_samples(context: Context, prompts: Sequence[Prompt], made: dict[str, Provenance]) -> list[EvaluatedSample]:
    """Each policy's completion of each prompt. A prompt's seed is the same for every policy.

    Args:
        made: receives the provenance entries that the samples name.
    """
    requests = _requests(context, prompts)
    samples = []
    for policy in context.settings.policies:
        completed, entry = _completions(context, policy, requests, policy)
        made[entry.id] = entry
        samples += [
            _sample(policy, prompt, completed[prompt.id], request.seed, entry.id)
            for prompt, request in zip(prompts, requests, strict=True)
        ]
    return samples


def draw_candidates(
    context: Context, prompts: Sequence[Prompt], n: int, made: dict[str, Provenance]
) -> list[EvaluatedSample]:
    """The SFT policy's n completions of each prompt, from which best-of-n chooses; `made` as for `draw_samples`."""
    requests = candidate_requests(_requests(context, prompts), n, context.seed)
    reference = reference_of(context)
    completed, entry = _completions(context, reference, requests, best_of_name(n))
    made[entry.id] = entry
    seeds = {request.id: request.seed for request in requests}
    drawn = [(prompt, candidate_id(prompt.id, number)) for prompt in prompts for number in range(n)]
    return [
        replace(_sample(reference, prompt, completed[name], seeds[name], entry.id), id=f"{best_of_name(n)}/{name}")
        for prompt, name in drawn
    ]


def with_divergence(samples: Sequence[EvaluatedSample], context: Context) -> list[EvaluatedSample]:
    """The samples with estimates of their policy's KL to the SFT policy, at the sampling temperature.

    They stay without where `no_kl_estimate` has a reason.
    """
    block: ModelBlock = context.shared["model"]
    sampling: SamplingBlock = context.settings.sampling
    if no_kl_estimate(sampling):
        return list(samples)

    def logprobs(of: Sequence[EvaluatedSample], under: str, name: str) -> dict[str, Any]:
        path, revision = str(context.inputs.get(under, Path()) / "model"), None
        if under == BASE:
            path, revision = block.path, block.revision
        load = partial(policy_logprobs, path, block, sampling.temperature, revision)
        journal = context.output / f"logprobs-{name}.journal"
        return measure_all(of, load, sampling.batch_size, journal, f"log-probs of {name}")

    reference_policy = reference_of(context)
    others = [sample for sample in samples if sample.policy != reference_policy]
    own: dict[str, Any] = {}
    for policy in dict.fromkeys(sample.policy for sample in others):
        own |= logprobs([sample for sample in others if sample.policy == policy], policy, policy)
    reference = logprobs(others, reference_policy, "reference") if others else {}
    divergence = {sample.id: kl_sums(own[sample.id], reference[sample.id]) for sample in others}
    return [
        replace(sample, kl_to_reference_k1=k1, kl_to_reference_k3=k3)
        for sample in samples
        for k1, k3 in [divergence.get(sample.id, (0.0, 0.0))]
    ]


def no_kl_estimate(sampling: SamplingBlock) -> str:
    """Why the completions' log-probabilities estimate no KL to the reference; empty if they do.

    k1 and k3 average to the KL over completions drawn from the policy's own distribution. Others estimate something
    else, which may even be negative.
    """
    if sampling.temperature == 0:
        return "greedy completions are not drawn from the policy's distribution; set `evaluate.sampling.temperature`"
    if sampling.top_p < 1:
        return "with `evaluate.sampling.top_p` below 1, completions are drawn from a part of the policy's distribution"
    return ""


def with_scores(samples: Sequence[EvaluatedSample], context: Context) -> list[EvaluatedSample]:
    """The samples with the reward model's scores."""
    batch_size = context.settings.sampling.batch_size
    scores = measure_all(
        samples,
        lambda: reward_scores(context.inputs["reward"] / "model", context.shared["model"], batch_size),
        batch_size,
        context.output / "scores.journal",
        "reward scores",
    )
    return [replace(sample, score=scores[sample.id]) for sample in samples]


def _requests(context: Context, prompts: Sequence[Prompt]) -> list[Request]:
    sampling: SamplingBlock = context.settings.sampling
    how = (sampling.max_new_tokens, sampling.temperature, sampling.top_p)
    seeds = [derive_seed(context.seed, "evaluate", prompt.id) for prompt in prompts]
    return [
        Request(prompt.id, prompt.prompt, seed, *how, keep_token_ids=True)
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]


def _completions(
    context: Context, policy: str, requests: Sequence[Request], name: str
) -> tuple[dict[str, Completed], Provenance]:
    """A policy's completions by request id, and their provenance. The journal is called by `name`."""

    def entry_of(engine: Engine) -> Provenance:
        return text_provenance(context, "completion", engine, EngineBlock(), writer=name)

    folder = None if policy == BASE else str(context.inputs[policy] / "model")
    journal = context.output / f"completions-{name}.journal"
    batch_size = context.settings.sampling.batch_size
    return policy_completions(
        folder, context.shared["model"], requests, batch_size, journal, f"{name} answers", entry_of
    )


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
        thought=completed.thought,
        answered=completed.answered,
        token_ids=completed.token_ids,
    )
