"""What every test has: no network, one thread, and tiny models made from scratch."""

import os

os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_VERBOSITY="error",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    WANDB_MODE="offline",
    ACCELERATE_USE_CPU="true",
    OMP_NUM_THREADS="1",
)

from pathlib import Path

import pytest

TESTS = Path(__file__).parent
os.environ["PYTHONPATH"] = os.pathsep.join(
    part for part in (str(TESTS.parent), os.environ.get("PYTHONPATH", "")) if part
)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny causal LM with its tokenizer. Shared by the session: never write into it."""
    from tests.tiny import build_tiny_model

    return build_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_reward_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny one-score sequence classifier with its tokenizer. Never write into it."""
    from tests.tiny import build_tiny_reward

    return build_tiny_reward(tmp_path_factory.mktemp("tiny") / "reward")


@pytest.fixture
def tiny_prompts(tmp_path: Path) -> Path:
    """A JSONL file of 24 prompts in two categories."""
    from tests.tiny import build_tiny_prompts

    return build_tiny_prompts(tmp_path / "prompts.jsonl")
