"""One setting of TRL 1.12's PPOTrainer for ppo_step.py, in an environment that has TRL 1.12.

Prints its result as JSON on the last line. Prompts, rows, lengths and temperature are the same as ours; reference,
reward model and value model are full models, as TRL has them.
"""

import json
import os
import resource
import sys
import tempfile
import time
from typing import Any

os.environ |= {"ACCELERATE_USE_CPU": "1", "HF_HUB_OFFLINE": "1"}

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer


class Clock(TrainerCallback):
    """Records when each step ends."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.times.append(time.perf_counter())


def main(setting: dict[str, Any], steps: int) -> None:
    torch.manual_seed(0)
    dtype = getattr(torch, setting["dtype"])
    tokenizer = AutoTokenizer.from_pretrained(setting["model"], padding_side="left")
    with open(setting["prompts"], encoding="utf-8") as file:
        conversations = [json.loads(line)["prompt"] for line in file]
    texts = [tokenizer.apply_chat_template(each, add_generation_prompt=True, tokenize=False) for each in conversations]
    rows = setting["rollout"]
    needed = [texts[number % len(texts)] for number in range(rows * (steps + 1))]
    dataset = Dataset.from_dict({"input_ids": [tokenizer(text)["input_ids"] for text in needed]})

    policy = AutoModelForCausalLM.from_pretrained(setting["model"], dtype=dtype)
    scorers = [
        AutoModelForSequenceClassification.from_pretrained(setting["model"], num_labels=1, dtype=dtype)
        for _ in ("reward", "value")
    ]
    for scorer in scorers:
        scorer.config.pad_token_id = tokenizer.pad_token_id
    if setting["mode"] == "lora":
        adapters = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        reference: dict[str, Any] = {"ref_model": None, "peft_config": adapters}
    else:
        reference = {"ref_model": AutoModelForCausalLM.from_pretrained(setting["model"], dtype=dtype)}
    with tempfile.TemporaryDirectory() as output:
        config = PPOConfig(
            output_dir=output,
            total_episodes=rows * (steps + 1),
            per_device_train_batch_size=setting["micro_batch"],
            gradient_accumulation_steps=rows // setting["micro_batch"],
            num_mini_batches=1,
            num_ppo_epochs=setting["epochs"],
            response_length=setting["new_tokens"],
            temperature=setting["temperature"],
            local_rollout_forward_batch_size=rows,
            num_sample_generations=0,
            stop_token="eos",
            missing_eos_penalty=1.0,
            learning_rate=1e-5,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
        )
        trainer = PPOTrainer(
            args=config,
            processing_class=tokenizer,
            model=policy,
            reward_model=scorers[0],
            value_model=scorers[1],
            train_dataset=dataset,
            eval_dataset=dataset.select(range(4)),
            **reference,
        )
        clock = Clock()
        trainer.add_callback(clock)
        trainer.train()
    seconds = [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(json.dumps({"seconds": seconds[1:], "peak_gb": peak}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), int(sys.argv[2]))
