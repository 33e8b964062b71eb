"""Products of 8-bit weights on CPUs, which bitsandbytes computes wrongly on some of them.

Without AVX-512 it multiplies the whole numbers as float32. Under autocast that product is in 16 bits instead: in
float16 sums above 65,504 become infinite, in bfloat16 they are rounded.
"""

from __future__ import annotations

import bitsandbytes  # noqa: F401 - it declares the operator
import torch


def exact_products(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the products of whole numbers in 8 bits, in 32 bits.

    Args:
        values: (…, in).
        weights: (out, in).

    Returns:
        (…, out).
    """
    with torch.autocast("cpu", enabled=False):
        return torch.matmul(values.float(), weights.float().t()).to(torch.int32)


if torch.backends.cpu.get_cpu_capability() != "AVX512":  # as bitsandbytes decides
    torch.library.register_kernel("bitsandbytes::int8_linear_matmul", "cpu", exact_products)
