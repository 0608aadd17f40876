"""What a run needs in order to be reproduced: derived seeds, and the versions that it ran with."""

import hashlib
import importlib.metadata
import os
import platform
import resource
import sys

PACKAGES = ("align-rlhf", "torch", "transformers", "trl", "peft", "accelerate", "datasets")


def derive_seed(seed: int, *names: str | int) -> int:
    """A seed in [0, 2^63) that depends only on the recipe's seed and on the names of its use."""
    text = "\x1f".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def make_deterministic() -> None:
    """Have torch use only algorithms that give the same bits each time, or raise where it has none for an operation.

    Called before CUDA is used: cuBLAS and flash attention read their variables when they start.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")
    import torch

    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def environment() -> dict[str, str]:
    """Versions of Python, of the platform and of the packages that results depend on."""
    versions = {"python": platform.python_version(), "machine": platform.machine()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def peak_resident_gb() -> float:
    """This process's peak resident memory, in GB (10^9 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9
