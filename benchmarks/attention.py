"""Forward and backward pass of attention on a CPU: PyTorch's flash kernel beside plain products, by length.

    python benchmarks/attention.py

Eight rows of nine heads that share three, 64 features each, as in SmolLM2-135M.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from align.models.cpu_attention import MAX_SHORT_POSITIONS, _PlainAttention

ROWS, HEADS, SHARED, FEATURES = 8, 9, 3, 64


def flash(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """PyTorch's own, keys and values repeated for the heads that share them."""
    groups = HEADS // SHARED
    repeated = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    return scaled_dot_product_attention(query, *repeated, attn_mask=mask)


def plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Ours."""
    result: Tensor = _PlainAttention.apply(query, key, value, mask, FEATURES**-0.5)
    return result


def milliseconds(attention: Callable[..., Tensor], length: int, dtype: torch.dtype, repeats: int = 15) -> float:
    """Median time of both passes."""
    torch.manual_seed(0)
    query = torch.randn(ROWS, HEADS, length, FEATURES, dtype=dtype, requires_grad=True)
    key, value = (torch.randn(ROWS, SHARED, length, FEATURES, dtype=dtype, requires_grad=True) for _ in range(2))
    mask = torch.ones(length, length, dtype=torch.bool).tril().expand(ROWS, 1, length, length)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        attention(query, key, value, mask).sum().backward()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[3:])


def main() -> None:
    print(f"plain products are taken up to {MAX_SHORT_POSITIONS} positions, in bf16")
    for dtype in (torch.bfloat16, torch.float32):
        for length in (64, 128, 192, 256, 512):
            one, other = (milliseconds(attention, length, dtype) for attention in (flash, plain))
            print(f"{str(dtype).removeprefix('torch.')}, {length} positions: flash {one:.1f} ms, plain {other:.1f} ms")


if __name__ == "__main__":
    main()
