"""What bf16 is worth on this CPU, and what it costs a merged adapter.

    python benchmarks/precision.py

Prints the rate of a matrix product in fp32 and bf16 on one thread, and the share of bf16 weights that adding a LoRA
difference changes at all.
"""

import time

import torch

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


def share_kept(entry: float) -> float:
    """Share of the difference's entries that change the bf16 weight they are added to, B's entries about `entry`."""
    generator = torch.Generator().manual_seed(0)
    trunk = (torch.randn(576, 576, generator=generator) * WEIGHT_SIZE).bfloat16()
    down = torch.randn(RANK, 576, generator=generator) / 576**0.5
    up = torch.randn(576, RANK, generator=generator) * entry
    merged = (trunk.float() + ALPHA / RANK * up @ down).bfloat16()
    return float((merged != trunk).float().mean())


def main() -> None:
    torch.set_num_threads(1)
    fp32, bf16 = gflops(torch.float32), gflops(torch.bfloat16)
    print(f"{SIZE}^3 product, one thread: fp32 {fp32:.0f} GFLOPS, bf16 {bf16:.0f}, ratio {bf16 / fp32:.2f}")
    for entry in (2e-5, 1e-4, 4e-4):
        print(f"B about {entry:.0e}: {share_kept(entry):.0%} of the weights change when merged in bf16")


if __name__ == "__main__":
    main()
