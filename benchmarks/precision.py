"""What bf16 is worth on this CPU, and what it costs a merged adapter.

    python benchmarks/precision.py

Prints the rate of a matrix product in fp32 and bf16 on one thread, and how much of a LoRA adapter a bf16 merge keeps.
"""

import time

import torch

from align.models.lora import dither, dithered

SIZE = 2048
RANK, ALPHA, WEIGHT_SIZE = 32, 64, 0.03


def gflops(dtype: torch.dtype, repeats: int = 5) -> float:
    """Best rate of a (SIZE, SIZE) product, in 10^9 operations a second."""
    factor = torch.randn(SIZE, SIZE, dtype=dtype)
    factor @ factor
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        factor @ factor
        best = min(best, time.perf_counter() - start)
    return 2 * SIZE**3 / best / 1e9


def shares_kept(entry: float) -> tuple[float, float]:
    """How much of an adapter a merge into bf16 keeps, rounded to the nearest and dithered; B's entries about `entry`.

    By projection: <merged - W, difference> / <difference, difference>, 1 where all of it is there on average.
    """
    generator = torch.Generator().manual_seed(0)
    trunk = (torch.randn(576, 576, generator=generator) * WEIGHT_SIZE).bfloat16()
    down = torch.randn(RANK, 576, generator=generator) / 576**0.5
    up = torch.randn(576, RANK, generator=generator) * entry
    difference = ALPHA / RANK * up @ down
    whole = trunk.float() + difference
    merges = whole.bfloat16(), dithered(whole, dither(whole.numel(), whole.device))
    nearest, dithers = (
        float(((merged.float() - trunk.float()) * difference).sum() / difference.square().sum()) for merged in merges
    )
    return nearest, dithers


def main() -> None:
    torch.set_num_threads(1)
    fp32, bf16 = gflops(torch.float32), gflops(torch.bfloat16)
    print(f"{SIZE}^3 product, one thread: fp32 {fp32:.0f} GFLOPS, bf16 {bf16:.0f}, ratio {bf16 / fp32:.2f}")
    for entry in (5e-6, 2e-5, 1e-4, 4e-4):
        nearest, dithers = shares_kept(entry)
        print(f"B about {entry:.0e}: a merge in bf16 keeps {nearest:.0%} of it to the nearest, {dithers:.0%} dithered")


if __name__ == "__main__":
    main()
