"""ppo: train the SFT policy on the prompts of the rl split, against the reward model or other rewards."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from align.constitution.loading import load_constitution, try_load_constitution
from align.engines.engine import EngineIdentity
from align.engines.provenance import PROVENANCE, Provenance, sampling_settings, write_provenance
from align.errors import InputError
from align.records import Demonstration, Prompt, Split, read_rows
from align.rl.settings import OUTPUT_ADAPTED, PpoBlock
from align.run import processes
from align.run.reproducibility import derive_seed
from align.run.stage import Context, Outcome, Stage
from align.settings.blocks import LoraBlock

SPLIT: Split = "rl"
OUTPUT_LAYERS = ("lm_head", "embed_out")
"""What most models call their output layer."""


class Ppo(Stage):
    name = "ppo"
    help = "train the SFT policy against rewards (PPO)"
    settings = PpoBlock
    shares = ("model",)
    trains = True
    outputs = ("model", "adapter", "rollouts.jsonl", PROVENANCE, "metrics.jsonl", "alarms.jsonl")

    def inputs(self, settings: PpoBlock) -> tuple[str, ...]:
        demonstrations = ["sft"] if settings.ptx_coef else []
        return ("sample", *demonstrations, *(["reward"] if settings.reads_reward_stage else []))

    def optional_inputs(self, settings: PpoBlock) -> tuple[str, ...]:
        return () if settings.ptx_coef else ("sft",)

    def splits(self, settings: PpoBlock) -> tuple[Split, ...]:
        return (SPLIT,)

    def shared_blocks(self, settings: PpoBlock) -> tuple[str, ...]:
        return (*self.shares, "constitution", "judge") if settings.asks_judge else self.shares

    def check(self, settings: PpoBlock, shared: Mapping[str, Any]) -> list[str]:
        from align.feedback.probes import labelling_problems

        problems = _adapter_problems(shared["model"].lora)
        if settings.asks_judge and (constitution := try_load_constitution(shared["constitution"])):
            problems += labelling_problems(constitution, shared["judge"])
        return problems

    def files(self, settings: PpoBlock) -> tuple[str, ...]:
        modules = {source.function.partition(":")[0] for source in settings.rewards if source.function}
        files = (f"{module.replace('.', '/')}.py" for module in sorted(modules))
        return tuple(file for file in files if Path(file).is_file())

    def run(self, context: Context) -> Outcome:
        import torch

        from align.models.loading import compute_dtype, load_tokenizer, stop_token_ids
        from align.models.saving import save_model
        from align.rl.ppo import PpoTrainer
        from align.rl.rewards import Rewards
        from align.rl.updates import open_accelerator

        settings: PpoBlock = context.settings
        model_block = context.shared["model"]
        _check_divisible(settings)
        torch.manual_seed(context.seed)
        accelerator = open_accelerator()
        policy, revision = context.policy
        tokenizer = load_tokenizer(policy, revision=revision, trust_remote_code=model_block.trust_remote_code)
        prompts, too_long = _prompts(context, tokenizer)
        judged, probes = _direct_scores(context, [each.prompt for each in prompts]) if settings.asks_judge else ({}, {})
        dtype = compute_dtype(model_block.precision)
        reward = _reward_folder(context) if settings.reads_reward_stage else None
        models = _models(context, reward, dtype, accelerator)
        with context.tracker() as tracker:
            trainer = PpoTrainer(
                models,
                tokenizer,
                prompts,
                Rewards(
                    _sources(context, models, reward, judged, tokenizer, dtype, accelerator.device), settings.score
                ),
                settings,
                stop_ids=stop_token_ids(models.causal_lm, tokenizer),
                seed=context.seed,
                output=context.output,
                tracker=tracker,
                demonstrations=_demonstrations(context, tokenizer) if settings.ptx_coef else (),
                provenance=_provenance(context, str(dtype).removeprefix("torch.")),
                accelerator=accelerator,
            )
            figures = trainer.train()
        state = trainer.policy_state()
        if processes.is_first():
            save_model(models.policy, tokenizer, context.output, dtype, adapter_name="policy", state_dict=state)
        assert trainer.ending is not None
        ending = {
            "iterations": trainer.ending.iteration,
            "stopped_early": trainer.ending.stopped,
            "published_iteration": trainer.ending.published,
        }
        return Outcome({"prompts": len(prompts), "prompts_too_long": too_long}, figures | ending | probes)


def _reward_folder(context: Context) -> Any:
    """The reward stage's result, with the moments by which the value's first predictions are standardised.

    `running` has seen no score yet, so the held-out pairs' moments stand in. Only `none` leaves scores as they are.
    """
    from align.rl.loading import reward_folder

    reward = reward_folder(context.inputs["reward"])
    return replace(reward, mean=0.0, std=1.0) if context.settings.score.normalise == "none" else reward


def _models(context: Context, reward: Any, dtype: Any, accelerator: Any) -> Any:
    """Policy, reference and value model, on the accelerator's device."""
    from align.models.positions import check_length
    from align.rl.loading import load_models
    from align.rl.updates import is_sharding

    settings, model_block = context.settings, context.shared["model"]
    policy, revision = context.policy
    models = load_models(
        policy,
        reward,
        model_block.lora,
        value=settings.value if settings.advantage == "gae" else None,
        dtype=dtype,
        temperature=settings.sampling.temperature,
        trust_remote_code=model_block.trust_remote_code,
        revision=revision,
    )
    longest = settings.max_prompt_tokens + settings.sampling.max_new_tokens
    check_length(models.causal_lm, longest, "lower ppo.max_prompt_tokens or ppo.sampling.max_new_tokens")
    if not is_sharding(accelerator):  # sharding moves each process's shard by itself; the whole model may not fit
        models.to(accelerator.device)
    return models


def _adapter_problems(lora: LoraBlock | None) -> list[str]:
    """What can be said of the adapted layers before a model is loaded; `load_models` looks at the model itself."""
    targets = lora.target_modules if lora is not None else ()
    named = [targets] if isinstance(targets, str) else targets
    return [OUTPUT_ADAPTED.format(name=name) for name in named if name in OUTPUT_LAYERS]


def _provenance(context: Context, precision: str) -> str:
    """Write the provenance of the rollouts, and return its id.

    It names the weights that training began with; a row's iteration says how often they were updated before.
    """
    from align.models.weights import Weights, model_folder

    how = {**sampling_settings(context), "weights": "as training began"}
    policy, revision = context.policy
    folder = model_folder(policy, revision)
    weights = processes.decide_on_first_rank(Weights(folder).digest) if folder else ""
    parts = 2 if "sft" in context.inputs else 1  # of a user's path only the model's own folder is shown
    name = "/".join(Path(policy).parts[-parts:]) if Path(policy).is_dir() else policy
    identity = EngineIdentity("local", name, weights, precision=precision)
    entry = Provenance.of(context.stage, "completion", identity, how, context.seed)
    write_provenance(context.output, [entry])
    return entry.id


def _check_divisible(settings: PpoBlock) -> None:
    world = processes.world_size()
    for key, value in (("rollout_batch", settings.rows), ("optimizer.batch_size", settings.optimizer.batch_size)):
        if value % world:
            raise InputError(f"ppo.{key}: {value} rows cannot be divided among {world} processes; use a multiple")


def _prompts(context: Context, tokenizer: Any) -> tuple[list[Any], int]:
    """The tokenized prompts of the rl split, and the number of prompts left out because they are too long."""
    from align.data.chat import prompt_ids
    from align.rl.rollout import TokenizedPrompt

    rows = [row for row in read_rows(context.inputs["sample"] / "prompts.jsonl", Prompt) if row.split == SPLIT]
    system = context.shared["model"].system_prompt
    tokenized = [TokenizedPrompt(row, tuple(prompt_ids(tokenizer, row.prompt, system))) for row in rows]
    kept = [prompt for prompt in tokenized if len(prompt.ids) <= context.settings.max_prompt_tokens]
    if not kept:
        raise InputError(
            f"ppo: no prompt to train on: {len(rows)} in the rl split, {len(rows) - len(kept)} longer than "
            "ppo.max_prompt_tokens; raise prompts.split.rl or ppo.max_prompt_tokens"
        )
    if len(kept) < len(rows) and processes.is_first():
        print(
            f"ppo: trains on {len(kept)} prompts, none of them cut; {len(rows) - len(kept)} are longer than "
            f"`max_prompt_tokens` {context.settings.max_prompt_tokens} and left out",
            flush=True,
        )
    return kept, len(rows) - len(kept)


def _demonstrations(context: Context, tokenizer: Any) -> list[Any]:
    """The demonstrations of the SFT stage, tokenized, without those longer than a row of PPO may be."""
    from align.data.chat import conversation_ids
    from align.rl.rollout import Completion, TokenizedPrompt

    settings: PpoBlock = context.settings
    kept = []
    for row in read_rows(context.inputs["sft"] / "demonstrations.jsonl", Demonstration):
        opening, words = conversation_ids(tokenizer, row.prompt, row.completion, context.shared["model"].system_prompt)
        if len(opening) + len(words) <= settings.max_prompt_tokens + settings.sampling.max_new_tokens:
            prompt = TokenizedPrompt(Prompt(id=row.id, prompt=row.prompt, split="sft"), tuple(opening))
            kept.append(Completion(prompt, tuple(words), row.completion, True, ()))
    if not kept:
        raise InputError(
            "ppo.ptx_coef: no demonstration is short enough; raise ppo.max_prompt_tokens, or set this to 0"
        )
    return kept


def _direct_scores(context: Context, prompts: Sequence[Prompt]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The judge's direct scores by a source's `principle` ('all' or 'draw'), and the judge's figures on its probes.

    Raises:
        JudgeAtChance: the probes do not show the judge's scores to be better than chance.
    """
    from align.feedback.direct import DirectScorer, examine_direct
    from align.feedback.judge import open_judge
    from align.feedback.probes import require_better_than_chance

    block, model = context.shared["judge"], context.shared["model"]
    judge = open_judge(block, model, load_constitution(context.shared["constitution"]))
    report = examine_direct(DirectScorer(judge))
    require_better_than_chance(judge, report)
    categories = {prompt.prompt: prompt.category for prompt in prompts}
    seeds = {"all": None, "draw": derive_seed(context.seed, "ppo", "judge")}
    scores = {principle: DirectScorer(judge, categories, seed) for principle, seed in seeds.items()}
    return scores, {"judge": report.as_figures()}


def _sources(
    context: Context,
    models: Any,
    reward: Any,
    judged: Mapping[str, Any],
    tokenizer: Any,
    dtype: Any,
    device: Any,
) -> list[Any]:
    """The sources of the reward, in the recipe's order."""
    from align.rl.batches import ROWS_WITHOUT_GRADIENT
    from align.rl.reward_sources import JudgeReward, open_reward
    from align.rl.rewards import RewardModel, RewardSource

    settings, model_block = context.settings, context.shared["model"]
    batch_size = settings.optimizer.micro_batch_size * ROWS_WITHOUT_GRADIENT
    sources = []
    for source in settings.rewards:
        moments = None
        if source.judge is not None:
            scores: Any = JudgeReward(judged[source.principle])
        elif source.stage is None:
            options = {"batch_size": batch_size, "dtype": dtype, "device": device}
            scores = open_reward(source, model_block, policy_tokenizer=tokenizer, **options)
        else:
            moments = (reward.mean, reward.std)
            read = _reward_stage_scores(models, reward, model_block, dtype, device, tokenizer.pad_token_id)
            scores = RewardModel(read, batch_size)
        sources.append(RewardSource(source.key, scores, source.weight, moments, source.gold))
    return sources


def _reward_stage_scores(models: Any, reward: Any, model_block: Any, dtype: Any, device: Any, pad_id: int) -> Any:
    """Scores by the reward adapter on the policy's trunk, or by the reward stage's model, loaded separately."""
    from align.rl.loading import classifier_scores, load_classifier, trunk_scores

    if reward.shares_trunk and model_block.lora is not None:
        return trunk_scores(models, pad_id)
    classifier = load_classifier(reward.path / "model", dtype, trust_remote_code=model_block.trust_remote_code)
    return classifier_scores(classifier.to(device), dtype, pad_id)


STAGE = Ppo()
