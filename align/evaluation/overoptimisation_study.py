"""The proxy and gold reward of a finished run against the distance from the SFT policy, for best-of-n and for PPO.

The proxy is the reward stage's model, by which best-of-n chooses and against which PPO is trained. The gold reward is a
source that the recipe marks as gold. PPO's points come from its rollouts, those of best-of-n from the candidates that
the evaluate stage keeps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from align.errors import InputError
from align.evaluation.overoptimisation import (
    BEST_OF_N_LAW,
    RL_LAW,
    Array,
    Fit,
    Law,
    Points,
    PromptSums,
    best_of_sums,
    doubling_sizes,
    fit_curve,
    rollout_sums,
)
from align.evaluation.report import EvaluatedSample, read_candidates
from align.records import read_jsonl
from align.run.artefacts import Manifest, read_manifest, require_run, stage_folder
from align.run.reproducibility import derive_seed
from align.settings.blocks import ModelBlock, RewardSourceBlock

MIN_CANDIDATES = 3
"""Completions per prompt: with fewer, best-of-n has less than two points away from the SFT policy."""
COMPARED_SETTINGS = ("temperature", "top_p", "max_new_tokens")
Candidates = Sequence[Sequence[EvaluatedSample]]


@dataclass(frozen=True)
class Curve:
    """One way to optimise: its points and the law fitted to them. `step` names what `steps` count: n or iterations."""

    name: str
    step: str
    steps: tuple[int, ...]
    points: Points
    law: Law
    fits: Mapping[str, Fit]


@dataclass(frozen=True)
class Moments:
    """A reward's mean and standard deviation over the SFT policy's completions, on the reward's own scale."""

    mean: float
    std: float


@dataclass(frozen=True)
class Study:
    """A run's over-optimisation.

    `unscored` counts the candidates without a score, which count as the mean of the others. `sampled_differently` names
    the sampling settings in which PPO and evaluate differ.
    """

    run: str
    proxy: str
    gold: str
    prompts: int
    candidates: int
    sft: Mapping[str, Moments]
    curves: tuple[Curve, ...]
    unscored: Mapping[str, int]
    sampled_differently: tuple[str, ...]


def load_study(run: Path, gold: str | None = None, resamples: int = 2000) -> Study:
    """The curves of a run and the laws fitted to them.

    Args:
        run: the run's folder, such as `runs/overoptimisation/style-asking-0a1b2c3d`.
        gold: the name of the gold source, needed if the recipe has several.
        resamples: how often the prompts are resampled for the intervals.

    Raises:
        InputError: the run has no gold source, no candidates, a proxy other than the reward stage, or too few points.
    """
    require_run(run)
    ppo, evaluate = (stage_folder(run, name) for name in ("ppo", "evaluate"))
    trained, evaluated = _manifest(ppo), _manifest(evaluate)
    _check_same_inputs(trained, evaluated, run)
    proxy, gold_source = proxy_and_gold(trained, gold)
    candidates = _by_prompt(read_candidates(evaluate), evaluate)
    scores = {
        "proxy": _proxy_scores(candidates),
        "gold": _gold_scores(candidates, gold_source, trained, stage_folder(run, "sft")),
    }
    tables = {name: _filled(table) for name, table in scores.items()}
    sft = _moments(tables, run)
    deviations = {name: moments.std for name, moments in sft.items()}
    seed = derive_seed(trained.settings["seed"], "overoptimisation")

    def curve(name: str, step: str, steps: Sequence[int], sums: PromptSums, law: Law) -> Curve:
        try:
            fits = fit_curve(law, sums, deviations, seed, resamples)
        except ValueError as error:
            raise InputError(f"{run}: {name}: {error}; evaluate more prompts, or train for longer") from None
        return Curve(name, step, tuple(steps), sums.all_points(deviations), law, fits)

    sizes = doubling_sizes(len(candidates[0]))
    iterations, rollouts = _rollouts(ppo, proxy.key, gold_source.key)
    return Study(
        run=f"{run.resolve().parent.name}/{run.resolve().name}",
        proxy=proxy.key,
        gold=gold_source.key,
        prompts=len(candidates),
        candidates=len(candidates[0]),
        sft=sft,
        curves=(
            curve("best-of-n", "n", sizes, best_of_sums(tables["proxy"], tables["gold"], sizes), BEST_OF_N_LAW),
            curve("ppo", "iteration", iterations, rollouts, RL_LAW),
        ),
        unscored={name: int(np.isnan(table).sum()) for name, table in scores.items()},
        sampled_differently=tuple(_sampling_differences(trained, evaluated)),
    )


def _moments(tables: Mapping[str, Any], run: Path) -> dict[str, Moments]:
    """Mean and standard deviation of each reward over the SFT policy's completions."""
    sft = {name: Moments(float(table.mean()), float(table.std())) for name, table in tables.items()}
    if alike := [name for name, moments in sft.items() if moments.std == 0]:
        raise InputError(
            f"{run}: the {alike[0]} reward gives every completion of the SFT policy the same score; use another"
        )
    return sft


def proxy_and_gold(trained: Manifest, gold: str | None) -> tuple[RewardSourceBlock, RewardSourceBlock]:
    """(proxy, gold) among PPO's reward sources.

    Raises:
        InputError: the proxy is not the reward stage alone, or `gold` does not settle which gold source is meant.
    """
    written: Sequence[Mapping[str, Any]] = trained.settings["settings"]["rewards"]
    given = [{key: value for key, value in source.items() if value is not None} for source in written]
    sources = [RewardSourceBlock(**source) for source in given]
    proxies = [source for source in sources if not source.gold]
    if len(proxies) != 1 or proxies[0].stage is None:
        raise InputError(
            f"ppo.rewards: trained against {', '.join(source.key for source in proxies)}, but best-of-n chooses by "
            "the reward stage's model; to compare the two, train against `stage: reward` alone"
        )
    golds = {source.key: source for source in sources if source.gold}
    if not golds:
        raise InputError("ppo.rewards: no gold source; add one such as {function: module:function, gold: true}")
    if (gold is None and len(golds) > 1) or (gold is not None and gold not in golds):
        raise InputError(f"--gold: name one of the gold sources: {', '.join(golds)}")
    chosen = golds[gold] if gold else next(iter(golds.values()))
    if chosen.judge is not None:
        raise InputError(
            f"ppo.rewards: the gold source {chosen.key} is the recipe's judge, which this command does not ask again "
            "about best-of-n's candidates; use a `model` or a `function` as the gold source"
        )
    return proxies[0], chosen


def _by_prompt(candidates: Sequence[EvaluatedSample], folder: Path) -> Candidates:
    """The candidates of each prompt. Every prompt has the same number."""
    by_prompt: dict[str, list[EvaluatedSample]] = {}
    for candidate in candidates:
        by_prompt.setdefault(candidate.prompt_id, []).append(candidate)
    rows = list(by_prompt.values())
    if len(rows[0]) < MIN_CANDIDATES:
        fault = f"{len(rows[0])} completions per prompt are too few for a curve"
        raise InputError(f"{folder}: {fault}; set `evaluate.best_of` to {MIN_CANDIDATES} or more")
    return rows


def _proxy_scores(candidates: Candidates) -> Array:
    """(P, N) scores by the reward stage's model; NaN without an answer."""
    return np.array([[sample.score for sample in row] for row in candidates], dtype=np.float64)


def _gold_scores(candidates: Candidates, source: RewardSourceBlock, trained: Manifest, sft: Path) -> Array:
    """(P, N) scores by the gold source; NaN where it has none."""
    from align.models.loading import compute_dtype, default_device, load_tokenizer
    from align.rl.reward_sources import open_reward
    from align.rl.rewards import Response, Rewards, RewardSource
    from align.rl.settings import ScoreBlock

    block = ModelBlock(**trained.settings["model"])
    batch_size = trained.settings["settings"]["optimizer"]["micro_batch_size"]
    tokenizer = None
    if source.model is not None:
        tokenizer = load_tokenizer(str(sft / "model"), trust_remote_code=block.trust_remote_code)
    reward = open_reward(
        source,
        block,
        policy_tokenizer=tokenizer,
        batch_size=batch_size,
        dtype=compute_dtype(block.precision),
        device=default_device(),
    )
    responses = [
        Response(each.prompt, each.completion, each.finish_reason == "stop", each.answered, token_ids=each.token_ids)
        for row in candidates
        for each in row
    ]
    scores = Rewards([RewardSource(source.key, reward, gold=True)], ScoreBlock()).scores(responses)
    return np.asarray(scores.double().numpy().reshape(len(candidates), -1))


def _filled(scores: Array) -> Array:
    """(P, N) scores. As in training, completions without one count as the mean of the others."""
    return np.where(np.isnan(scores), np.nanmean(scores), scores)


def _rollouts(ppo: Path, proxy: str, gold: str) -> tuple[list[int], PromptSums]:
    """The iterations in ascending order, and each prompt's part of them."""
    rows = list(read_jsonl(ppo / "rollouts.jsonl"))
    iterations = [row["iteration"] for row in rows]
    kl = np.array([row["kl_to_reference_k1"] for row in rows])
    scores = (np.array([row["scores"][name] for row in rows]) for name in (proxy, gold))
    return sorted(set(iterations)), rollout_sums([row["prompt_id"] for row in rows], iterations, kl, *scores)


def _manifest(folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    if manifest is None:
        raise InputError(f"{folder}: not finished; run its recipe with `align run` first")
    return manifest


def _check_same_inputs(trained: Manifest, evaluated: Manifest, run: Path) -> None:
    """Check that both stages used the same SFT policy and the same reward model."""
    for name in ("sft", "reward"):
        if trained.inputs.get(name) != evaluated.inputs.get(name):
            raise InputError(f"{run}: ppo and evaluate used different outputs of `{name}`; run the recipe again")


def _sampling_differences(trained: Manifest, evaluated: Manifest) -> list[str]:
    ppo, evaluate = (manifest.settings["settings"]["sampling"] for manifest in (trained, evaluated))
    return [name for name in COMPARED_SETTINGS if ppo[name] != evaluate[name]]
