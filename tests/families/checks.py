"""What every model family must pass: the same log-probabilities everywhere, training that learns, and saves that load.

Models are tiny and random (`tests.families.tiny_families`), and in float32, where two ways of computing a number agree
up to rounding.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from align.data.chat import token_ids
from align.decoding.decode import Decoded, decode
from align.engines.engine import ChoiceRequest, Request
from align.engines.local import LocalEngine
from align.errors import InputError
from align.models.loading import load_causal_lm
from align.models.saving import save_model
from align.records import Message, Prompt, read_jsonl
from align.rl.loading import RewardFolder, load_models, trunk_scores
from align.rl.models import GenerationView, PpoModels
from align.rl.ppo import PpoTrainer
from align.rl.reward_sources import load_classifier_reward
from align.rl.rewards import Response, Rewards, RewardSource
from align.rl.rollout import TokenizedPrompt
from align.rl.sequences import lay_out
from align.rl.settings import PpoBlock, ScoreBlock
from align.run.tracking import Tracker
from align.settings.blocks import LoraBlock, OptimizerBlock, SamplingBlock, TrackingBlock
from align.stages.dpo import STAGE as DPO
from align.stages.reward import STAGE as REWARD
from align.stages.sft import STAGE as SFT
from tests.families.tiny_families import VOCABULARY, Family, random_model
from tests.rl.tiny_ppo import share_of_letters
from tests.stages.training import asked, pair, revision, run, upstream
from tests.tiny import build_tokenizer

LORA = {"r": 2, "alpha": 8}
TEMPERATURE = 0.7
NEW_TOKENS = 8
CLOSE = 1e-4
"""Nats by which two ways of computing a log-probability may differ."""
STOP_IDS = tuple(range(1, VOCABULARY, 5))
"""So many that most completions end early, at different lengths."""
PROMPTS = [[7 + (3 * row + place) % 280 for place in range(3 + 5 * (row % 4))] for row in range(8)]
LONG_OPENING = [11 + (7 * place) % 270 for place in range(40)]
"""Long enough to be worth encoding once for all rows."""


def save_family(family: Family, folder: Path) -> Path:
    """The family's random model with the test tokenizer, as `save_pretrained` writes them."""
    random_model(family).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def check_family(family: Family, root: Path) -> dict[str, str]:
    """All checks of a family, each with LoRA and with every weight: what the page says of it, by the page's columns.

    What is refused has the refusal's words in its place.

    Raises:
        AssertionError: a check fails.
    """
    model = save_family(family, root / "base")
    inputs = upstreams(root / "upstream", model)
    checks: dict[str, Callable[[bool], None]] = {
        "same log-probs": lambda lora: check_logprobs(model, root / f"logprobs-{lora}", lora),
        "sampled, judged": lambda _: check_engine(model),
    }
    for stage in STAGES:
        checks[stage] = lambda lora, stage=stage: check_stage(stage, model, root / f"{stage}-{lora}", inputs, lora)  # type: ignore[misc]
    checks["ppo"] = lambda lora: check_ppo(model, root / f"ppo-{lora}", lora)
    return {name: _outcome(check) for name, check in checks.items()}


def _outcome(check: Callable[[bool], None]) -> str:
    try:
        for lora in (True, False):
            check(lora)
    except InputError as error:
        return str(error).partition(": ")[2]  # without the model's temporary folder
    return "yes"


def check_logprobs(folder: Path, output: Path, lora: bool) -> None:
    """PPO's sampling, its training pass, and the saved model, opened by plain transformers, agree on log-probabilities.

    With and without an opening that all prompts share; with LoRA the adapter is random, and so merged into what is
    saved.
    """
    block = LoraBlock(**LORA) if lora else None
    models = load_models(folder, None, block, value="head", dtype=torch.float32, temperature=TEMPERATURE)
    with torch.no_grad():
        for name, parameter in models.policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    save_model(models.policy, build_tokenizer(), output, torch.float32, adapter_name="policy")
    saved = AutoModelForCausalLM.from_pretrained(output / "model").eval()
    for opening in ([], LONG_OPENING):
        prompts = [opening + prompt for prompt in PROMPTS]
        drawn = _draw(models, prompts)
        assert len({len(row) for row in drawn.tokens}) > 1, "no row ended early"
        trained = _training_pass(models, prompts, drawn.tokens)
        for prompt, tokens, sampled, passed in zip(prompts, drawn.tokens, drawn.logprobs or [], trained, strict=True):
            own = own_logprobs(saved, prompt, tokens, TEMPERATURE)
            torch.testing.assert_close(torch.tensor(sampled), own, atol=CLOSE, rtol=0, msg=lambda m: f"sampling: {m}")
            torch.testing.assert_close(passed[: len(tokens)], own, atol=CLOSE, rtol=0, msg=lambda m: f"training: {m}")


def _draw(models: PpoModels, prompts: Sequence[Sequence[int]]) -> Decoded:
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "temperature": TEMPERATURE, "keep_logprobs": True}
    with torch.no_grad(), models.generation():
        return decode(
            GenerationView(models), prompts, seeds=range(len(prompts)), stop_ids=STOP_IDS, pad_id=1, **options
        )


def _training_pass(models: PpoModels, prompts: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]) -> Tensor:
    sequences = lay_out(prompts, tokens, 1, torch.device("cpu"), share=models.shares_prefixes)
    logprobs = models("train", sequences=sequences).logprobs
    assert logprobs.requires_grad
    return logprobs.detach()


def own_logprobs(model: Any, prompt: Sequence[int], tokens: Sequence[int], temperature: float = 1.0) -> Tensor:
    """Log-probabilities of one row without padding, cache or anything of ours."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]


def check_engine(folder: Path) -> None:
    """The local engine completes greedily like the model alone, and scores choices with the model's own log-probs."""
    model = load_causal_lm(str(folder), torch.float32)
    prompts = [LONG_OPENING + prompt for prompt in PROMPTS]
    engine = LocalEngine(model, build_tokenizer(), name="tiny")
    engine._stop_ids = STOP_IDS
    engine._prompt = lambda request: prompts[int(request.id)]  # token ids, whatever the text
    requests = [
        Request(str(number), (Message("user", ""),), 0, max_new_tokens=NEW_TOKENS, temperature=0.0)
        for number in range(len(prompts))
    ]
    completed = {each.id: each for each in engine.complete(requests, at_once=4)}
    for number, prompt in enumerate(prompts):
        expected = _greedy(model, prompt)
        assert completed[str(number)].tokens == len(expected)
    choices = [ChoiceRequest(str(number), (Message("user", ""),), ("the cat", "no")) for number in range(len(prompts))]
    for scores in engine.choice_logprobs(choices):
        for choice, found in zip(("the cat", "no"), scores.logprobs, strict=True):
            own = own_logprobs(model, prompts[int(scores.id)], token_ids(engine._tokenizer, choice)).sum()
            assert abs(found - float(own)) < CLOSE, "choices are scored otherwise than by the model's own logits"


def _greedy(model: Any, prompt: Sequence[int]) -> list[int]:
    """The most likely tokens one after the other, each from a whole pass without a cache."""
    tokens: list[int] = []
    while len(tokens) < NEW_TOKENS and not (tokens and tokens[-1] in STOP_IDS):
        with torch.no_grad():
            tokens.append(int(model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0, -1].argmax()))
    return tokens


def upstreams(root: Path, model: Path) -> dict[str, Path]:
    """What the training stages read: revisions, pairs, and the model as the SFT policy."""
    (root / "sft").mkdir(parents=True)
    (root / "sft/model").symlink_to(model)
    return {
        "sft": root / "sft",
        "sample": upstream(root, "sample", samples=[], prompts=[asked(number) for number in range(4)]),
        "revise": upstream(root, "revise", revisions=[revision(number) for number in range(4)]),
        "compare": upstream(root, "compare", pairs=[pair(number, 0.9) for number in range(4)]),
    }


BATCH = {"batch_size": 4, "micro_batch_size": 4, "schedule": "constant"}
LEARNING_RATES = {True: 3e-3, False: 3e-4}
"""With LoRA, and of every weight."""
STAGES: dict[str, tuple[Any, dict[str, Any], tuple[str, ...]]] = {
    "sft": (SFT, {}, ("sample", "revise")),
    "reward": (REWARD, {"held_out": 0.0}, ("sft", "compare")),
    "dpo": (DPO, {}, ("sft", "compare")),
}


def check_stage(name: str, folder: Path, output: Path, inputs: Mapping[str, Path], lora: bool) -> None:
    """A training stage on one batch: its loss falls, and plain transformers open what it saves."""
    stage, settings, reads = STAGES[name]
    given = {"optimizer": {"learning_rate": LEARNING_RATES[lora], **BATCH}, "epochs": 3, **settings}
    run(stage, given, folder, output, {key: inputs[key] for key in reads}, lora=LORA if lora else None)
    losses = [row["loss"] for row in read_jsonl(output / "metrics.jsonl") if "loss" in row]
    assert losses[-1] < losses[0], f"the loss went from {losses[0]:.4f} to {losses[-1]:.4f}"
    if name != "reward":
        AutoModelForCausalLM.from_pretrained(output / "model")
    elif lora:
        check_reward_adapter(folder, output)


def check_reward_adapter(folder: Path, reward: Path) -> None:
    """The reward stage's adapter on PPO's trunk gives the scores of the merged model, opened by plain transformers."""
    saved = AutoModelForSequenceClassification.from_pretrained(reward / "model").eval()
    options: dict[str, Any] = {"value": "adapter", "dtype": torch.float32, "temperature": 1.0}
    models = load_models(folder, RewardFolder(reward, True, mean=0.0, std=1.0), LoraBlock(**LORA), **options)
    scores = trunk_scores(models, 1)(PROMPTS)
    for prompt, score in zip(PROMPTS, scores, strict=True):
        with torch.no_grad():
            expected = saved(input_ids=torch.tensor([prompt])).logits[0, 0]
        torch.testing.assert_close(score, expected, atol=CLOSE, rtol=0)


def check_encoder(family: Family, root: Path) -> None:
    """PPO's scores by a classifier equal the model's own, one row at a time and unpadded, in float32."""
    torch.manual_seed(0)
    own = AutoModelForSequenceClassification.from_config(family.config()).eval()
    own.save_pretrained(root)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(root)
    reward = load_classifier_reward(
        str(root),
        revision=None,
        label=None,
        completion_alone=True,
        policy_tokenizer=build_tokenizer(),
        system_prompt=None,
        batch_size=3,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    texts = ["the cat", "on the mat and the dog ran to the garden", "no", "a cat sat"]
    scores = reward([Response((Message("user", "where?"),), text) for text in texts])
    for text, score in zip(texts, scores, strict=True):
        with torch.no_grad():
            expected = own(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits[0, 0]
        torch.testing.assert_close(score, expected, atol=CLOSE, rtol=0)


def check_ppo(folder: Path, output: Path, lora: bool) -> None:
    """An iteration of PPO lowers its policy's loss and its value's on the rollout that it was made from."""
    trainer = ppo_trainer(folder, output, LoraBlock(**LORA) if lora else None)
    experience = trainer.collector.collect(0, 0.0)
    before = _ppo_losses(trainer, experience)
    trainer.learner.update(experience)
    after = _ppo_losses(trainer, experience)
    assert after[0] < before[0], f"the policy's loss went from {before[0]:.4f} to {after[0]:.4f}"
    assert after[1] < before[1], f"the value's loss went from {before[1]:.4f} to {after[1]:.4f}"


def _ppo_losses(trainer: PpoTrainer, experience: Any) -> tuple[float, float]:
    rows = range(len(experience.completions))
    batch = next(iter(trainer.learner.batches.cut(experience.completions, rows, with_gradient=False)))
    mask = batch.sequences.completion_mask
    with torch.no_grad():
        current = trainer.models("train", sequences=batch.sequences)
        values = current.values
        if values is None:
            values = trainer.models("values", sequences=batch.sequences).result
    advantages, old, returns = (
        table[batch.rows] for table in (experience.advantages, experience.sampled_logprobs, experience.returns)
    )
    policy = -((current.logprobs - old).exp() * advantages)[mask].mean()
    return float(policy), float((values - returns)[mask].square().mean())


def ppo_trainer(folder: Path, output: Path, lora: LoraBlock | None) -> PpoTrainer:
    block = PpoBlock(
        iterations=1,
        rollout_batch=8,
        epochs=2,
        optimizer=OptimizerBlock(learning_rate=2e-3, batch_size=8, micro_batch_size=8, schedule="constant"),
        sampling=SamplingBlock(max_new_tokens=NEW_TOKENS, temperature=1.0, batch_size=8),
        score=ScoreBlock(normalise="running", clip=None),
    )
    value = "head" if lora is None else "adapter"
    models = load_models(folder, None, lora, value=value, dtype=torch.float32, temperature=1.0)
    prompts = [
        TokenizedPrompt(Prompt(id=f"p{number}", prompt=(Message("user", str(number)),), split="rl"), tuple(ids))
        for number, ids in enumerate(PROMPTS)
    ]
    output.mkdir(parents=True, exist_ok=True)
    return PpoTrainer(
        models,
        build_tokenizer(),
        prompts,
        Rewards([RewardSource("letters", share_of_letters)], block.score),
        block,
        stop_ids=STOP_IDS,
        seed=0,
        output=output,
        tracker=Tracker(output, TrackingBlock(), "tiny", "ppo"),
        accelerator=Accelerator(cpu=True),
    )
