"""Rates of decoding and of PPO on one GPU, beside transformers' `generate` and the floor set by memory bandwidth.

    python benchmarks/gpu.py --tokenizer FOLDER                      # every section, models of 135M and 1.7B parameters
    python benchmarks/gpu.py --tokenizer FOLDER --only ppo --size 8b

The models are random, with the shapes of SmolLM2 and of Llama 3.1 8B: what a step costs does not depend on the weights.
FOLDER has any tokenizer with a chat template, SmolLM2's for the figures in docs/benchmarks.md. A random model hardly
ever ends a completion, so all rows run to the limit. The first run of each section is a warm-up.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from ppo_step import measure
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128},
    "135m": {
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
    },
    "1.7b": {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32, "intermediate_size": 8192},
    "8b": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "tie_word_embeddings": False,
    },
}
DECODING = {"tiny": (4, 8), "135m": (32, 256), "1.7b": (128, 256), "8b": (128, 256)}
"""Rows and new tokens."""

ROLLOUTS = {"tiny": (8, 8, 4), "135m": (32, 48, 32), "1.7b": (128, 256, 32), "8b": (128, 256, 16)}
"""Prompts, new tokens, and rows of a micro-batch."""

PROMPT_TOKENS = range(20, 80)


def make_model(size: str, folder: Path, tokenizer: Path) -> None:
    """Save a random model of the size, in bf16, with the tokenizer."""
    base = json.loads((tokenizer / "config.json").read_text(encoding="utf-8"))
    common = {"max_position_embeddings": 8192, "rope_theta": 130000.0, "tie_word_embeddings": True}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    config = LlamaConfig(**{**common, **special, "vocab_size": base["vocab_size"], **SHAPES[size]})
    torch.manual_seed(0)
    with torch.device(DEVICE):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    for name in ("chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder)


def prompts(count: int, vocabulary: int) -> list[list[int]]:
    """Random prompts of unequal lengths."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(PROMPT_TOKENS.start, PROMPT_TOKENS.stop, (count,), generator=generator).tolist()
    return [torch.randint(10, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def timed(run: Callable[[], object], repeat: int = 3) -> float:
    """Seconds of the median run after the first."""
    times = []
    for _ in range(repeat):
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def synchronize() -> None:
    """Wait for the device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def decoding(size: str, folder: Path) -> Iterator[tuple[str, str]]:
    """Milliseconds a step of our decoding and of transformers', and the floor."""
    from align.decoding.continuous_batching import Task
    from align.decoding.slot_batching import SlotBatcher, can_use_slots

    rows, new = DECODING[size]
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(DEVICE).eval()
    ids = prompts(rows, model.config.vocab_size)
    label = f"decode {size}, {rows} rows, {new} tokens"

    def ours() -> None:
        batcher = SlotBatcher(model, rows=rows, max_new_tokens=new, temperature=0.7, top_p=1.0, stop_ids=[], pad_id=0)
        assert sum(len(each.tokens) for each in batcher.run(deque(Task(i, p, i) for i, p in enumerate(ids))))

    def theirs() -> None:
        width = max(map(len, ids))
        batch = torch.tensor([[0] * (width - len(each)) + each for each in ids], device=DEVICE)
        with torch.no_grad():
            model.generate(
                batch,
                attention_mask=(batch != 0).long(),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=True,
                temperature=0.7,
                top_k=0,
                pad_token_id=0,
            )

    yield label, f"{1000 * timed(ours) / new:.2f} ms a step (slots: {can_use_slots(model)})"
    yield f"{label}, transformers' generate", f"{1000 * timed(theirs, 2) / new:.2f} ms a step"
    yield f"{label}, floor", f"{floor_ms(model, ids, new):.2f} ms a step"


def floor_ms(model: Any, ids: list[list[int]], new: int) -> float:
    """Milliseconds to read the weights and the mean step's keys and values, at the bandwidth of a large copy."""
    config = model.config
    heads, size = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    cached = sum(len(each) + new / 2 for each in ids) * config.num_hidden_layers * 2 * heads * size
    read = (sum(parameter.numel() for parameter in model.parameters()) + cached) * model.dtype.itemsize
    return 1000 * read / bandwidth()


def bandwidth() -> float:
    """Bytes a second of a device-to-device copy, those read and those written."""
    source = torch.empty(2**30 if DEVICE == "cuda" else 2**24, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / timed(lambda: target.copy_(source), 10)


def make_reward_adapter(folder: Path, model: Path) -> None:
    """Write a reward stage's folder with a random adapter, without ever holding the reward model's weights."""
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    from align.models.lora import add_lora
    from align.settings.blocks import LoraBlock

    config = AutoConfig.from_pretrained(model, num_labels=1)
    with torch.device("meta"):
        classifier = add_lora(AutoModelForSequenceClassification.from_config(config), LoraBlock(), task_type="SEQ_CLS")
    shapes = {name: tensor.shape for name, tensor in get_peft_model_state_dict(classifier).items()}
    adapter = folder / "adapter"
    adapter.mkdir(parents=True)
    save_file(
        {name: 0.01 * torch.randn(shape) for name, shape in shapes.items()}, adapter / "adapter_model.safetensors"
    )
    classifier.peft_config["default"].save_pretrained(adapter)


def ppo(size: str, folder: Path) -> Iterator[tuple[str, str]]:
    """Seconds of an iteration of PPO with LoRA, a value head and a reward adapter, one epoch."""
    count, new, micro_batch = ROLLOUTS[size]
    with tempfile.TemporaryDirectory() as reward:
        make_reward_adapter(Path(reward), folder)
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        row = measure(
            {"value": "head", "epochs": 1},
            2,
            Path(reward),
            model=str(folder),
            rollout=count,
            new_tokens=new,
            micro_batch=micro_batch,
        )
    phases = ", ".join(f"{name.removeprefix('seconds_')} {value:.2f}" for name, value in row["phases"].items())
    peak = torch.cuda.max_memory_allocated() / 1e9 if DEVICE == "cuda" else row["peak_gb"]
    label = f"PPO iteration {size}, LoRA, {count} prompts, {new} tokens, micro-batch {micro_batch}"
    yield label, f"{min(row['seconds']):.2f} s ({phases}; peak {peak:.1f} GB; gap {row['first_log_ratio']:.3f})"


SECTIONS = {"decode": decoding, "ppo": ppo}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def told_failures(label: str) -> Iterator[None]:
    """Print what a section failed with, and go on with the next."""
    try:
        yield
    except Exception as error:
        print(f"{label}: failed, {type(error).__name__}: {str(error)[:400]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--size", nargs="+", choices=SHAPES, default=["135m", "1.7b"])
    arguments = parser.parse_args()
    if DEVICE == "cuda":
        print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    for size in arguments.size:
        with tempfile.TemporaryDirectory() as made:
            make_model(size, Path(made), arguments.tokenizer)
            for section in arguments.only:
                with told_failures(f"{section} {size}"):
                    for label, figure in SECTIONS[section](size, Path(made)):
                        print(f"{label}: {figure}", flush=True)


if __name__ == "__main__":
    main()
