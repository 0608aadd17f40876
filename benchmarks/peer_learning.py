"""One run of TRL 1.12's PPOTrainer for ppo_learning.py, in an environment that has TRL 1.12.

Prints its result as JSON on the last line. The models are as close to ours as the trainer allows: a policy with LoRA,
whose reference is the policy without it, and a separate value model with LoRA and a float32 head.
"""

import json
import sys
import tempfile
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, inject_adapter_in_model
from program_reward import ProgramReward, plain_words
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed
from trl.experimental.ppo import PPOConfig, PPOTrainer
from trl.experimental.utils import get_reward

FIXTURE = ("It is a red fox.", "Photosynthesis transforms electromagnetic radiation.", "", "One word\n\n- and a list")
LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load_tokenizer(setting: dict[str, Any]) -> Any:
    """The model's tokenizer with a separate pad token, as in TRL's own example, because TRL's masks compare ids."""
    tokenizer = AutoTokenizer.from_pretrained(setting["model"], padding_side="left")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    return tokenizer


def read_prompts(setting: dict[str, Any], tokenizer: Any) -> Dataset:
    """The token ids of every prompt, up to the opening of the assistant's turn."""
    with open(setting["prompts"], encoding="utf-8") as file:
        conversations = [json.loads(line)["prompt"] for line in file]
    texts = [tokenizer.apply_chat_template(each, add_generation_prompt=True, tokenize=False) for each in conversations]
    return Dataset.from_dict({"input_ids": [tokenizer(text)["input_ids"] for text in texts]})


def check_reward(reward: ProgramReward, tokenizer: Any, prompts: Dataset) -> None:
    """Check that TRL gets the program's score of each completion, whatever its length and the padding around it."""
    stop = tokenizer.eos_token_id
    ids = [[*tokenizer(text)["input_ids"], stop] for text in FIXTURE]
    rows = [prompt + each for prompt, each in zip(prompts[: len(ids)]["input_ids"], ids, strict=True)]
    context, width = max(map(len, prompts[: len(ids)]["input_ids"])), max(map(len, ids))
    pad = tokenizer.pad_token_id
    padded = [
        [pad] * (context + len(each) - len(row)) + row + [pad] * (width - len(each))
        for row, each in zip(rows, ids, strict=True)
    ]
    _, scores, _ = get_reward(reward, torch.tensor(padded), pad, context)
    expected = torch.tensor([plain_words(text) for text in FIXTURE])
    assert torch.equal(scores, expected), f"TRL gets {scores.tolist()}, but the program scores {expected.tolist()}"
    reward.scored.clear()


def lora(setting: dict[str, Any]) -> LoraConfig:
    """The LoRA settings of both the policy and the value model."""
    return LoraConfig(r=setting["lora_rank"], lora_alpha=setting["lora_alpha"], target_modules=LINEAR_LAYERS)


def value_model(setting: dict[str, Any]) -> Any:
    """The base model with LoRA and a new head, both trained. By default TRL would train all of its weights."""
    model = AutoModelForSequenceClassification.from_pretrained(setting["model"], num_labels=1, dtype=torch.float32)
    inject_adapter_in_model(lora(setting), model.model)
    return model


def configuration(setting: dict[str, Any], output: str) -> PPOConfig:
    """The settings as a config of TRL."""
    return PPOConfig(
        output_dir=output,
        seed=setting["seed"],
        total_episodes=setting["rows"] * setting["steps"],
        per_device_train_batch_size=setting["micro_batch"],
        gradient_accumulation_steps=setting["rows"] // setting["micro_batch"],
        num_mini_batches=1,
        num_ppo_epochs=setting["epochs"],
        response_length=setting["new_tokens"],
        temperature=setting["temperature"],
        kl_coef=setting["kl_coef"],
        cliprange=setting["clip_range"],
        cliprange_value=setting["value_clip_range"],
        vf_coef=setting["value_coef"],
        gamma=setting["gamma"],
        lam=setting["lam"],
        missing_eos_penalty=setting["missing_eos_penalty"] or None,
        learning_rate=setting["learning_rate"],
        lr_scheduler_type=setting["schedule"],
        local_rollout_forward_batch_size=setting["rows"],
        num_sample_generations=0,
        stop_token="eos",
        gradient_checkpointing=False,
        bf16=False,  # the trainer ignores this and reads ACCELERATE_MIXED_PRECISION from the environment
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
        save_strategy="no",
    )


def main(setting: dict[str, Any]) -> None:
    set_seed(setting["seed"])
    tokenizer = load_tokenizer(setting)
    dataset = read_prompts(setting, tokenizer)
    reward = ProgramReward(tokenizer, setting["opening"])
    check_reward(reward, tokenizer, dataset)
    with tempfile.TemporaryDirectory() as output:
        trainer = PPOTrainer(
            args=configuration(setting, output),
            processing_class=tokenizer,
            model=AutoModelForCausalLM.from_pretrained(setting["model"], dtype=torch.float32),
            ref_model=None,
            reward_model=reward,
            value_model=value_model(setting),
            train_dataset=dataset,
            eval_dataset=dataset.select(range(1)),
            peft_config=lora(setting),
        )
        trainer.train()
    history = [row for row in trainer.state.log_history if "objective/kl" in row]
    rewards = torch.tensor([score for _, score in reward.scored]).view(-1, setting["rows"]).mean(dim=1)
    kl = [row["objective/kl"] for row in history]
    print(json.dumps({"kl": kl, "reward": rewards.tolist(), "scored": reward.scored, "figures": history}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
