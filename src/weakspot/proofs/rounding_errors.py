"""Rounding: how far computed sums are from true ones, and the settings of torch that would make it more.

For a sum of n products in any order, with or without fused multiply-add, and with every operation rounded to nearest,

    |computed - true| <= gamma_n * sum |w_i| |x_i|,   gamma_n = n u / (1 - n u),

where u is the unit roundoff, 2^-24 in float32 and 2^-53 in float64 (Higham, Accuracy and Stability of Numerical
Algorithms, 2nd edition, equations 3.4 and 3.5; the bias counts as a product with 1). A product below the normal range
adds less than the smallest normal number.

Let x' be what the network has computed so far, known to lie in c + G e + [-r, r] for a color e in [-1, 1]^k. One
linear layer computes y' with |y' - (W x' + b)| <= gamma_n (|W| |x'| + |b|), and |x'| <= m = |c| + sum |G| + r, so

    y' in (W c + b) + (W G) e + [-r', r'],   r' = |W| r + gamma_n (|W| m + |b|).

Products with zero and sums with zero are exact, so n counts only the x' that may be other than zero, and the bias.
After a ReLU that is often less than half of them.

The bounds are themselves computed in float64. That adds gamma_n of float64 three times over (for W c + b, for W G and
for r'), which `own` covers. Under the statement "exact arithmetic" gamma_n of float32 is left out and nothing else.
"""

import os
from typing import TypeVar

import torch
from torch import Tensor, nn

Terms = TypeVar("Terms", float, Tensor)
UNIT = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
SMALLEST = 2.0**-126  # the smallest normal float32
# Values and sums of magnitudes must stay below it as run: averages sum up before they divide, by far less than 2^27.
LARGEST = 2.0**100
MOST_TERMS = 2**22  # gamma_n of float32 is positive only up to 2^24
TINY = 2.0**-1000  # more than underflow of float64 can add to any bound here


def gamma(terms: Terms, dtype: torch.dtype) -> Terms:
    """gamma_n of Higham, equation 3.4, rounded up; of a number, or of each number in a tensor."""
    part = terms * UNIT[dtype]
    if not bool(torch.as_tensor(part < 0.5).all()):
        raise ValueError(f"terms must be below {0.5 / UNIT[dtype]:g} in {dtype}, got {terms}")
    return part / (1 - part) * (1 + 2**-50)


def own(terms: int) -> float:
    """What computing a bound in float64 adds, relative to the sum of magnitudes: more than 3 gamma_(n + 8)."""
    return 4 * gamma(terms + 8, torch.float64)


def float32_troubles(network: nn.Module) -> str | None:
    """Why float32 arithmetic is not what the bounds assume, naming the setting; None if it is."""
    tensors = [*network.parameters(), *network.buffers()]
    low = next((t.dtype for t in tensors if t.dtype in {torch.float16, torch.bfloat16}), None)
    if low is not None:
        return f"the network has weights in {low}, and the rounding of half precision is not bounded"
    if any(t.dtype == torch.float64 for t in tensors):
        return "the network has weights in torch.float64 and does not run in float32 (call network.float())"
    for name in ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"):  # the second is its older name
        mode = os.environ.get(name, "STRICT").upper()
        if mode != "STRICT":
            return f"{name} is {mode}, which rounds more than float32 does (unset it)"
    if torch.get_float32_matmul_precision() != "highest":
        return (
            f"the float32 matmul precision is {torch.get_float32_matmul_precision()!r} "
            '(call torch.set_float32_matmul_precision("highest"))'
        )
    if torch.backends.cuda.matmul.allow_tf32:
        return "TF32 is allowed (set torch.backends.cuda.matmul.allow_tf32 = False)"
    # Settings that not every version of torch has.
    precisions = (
        ("torch.backends", torch.backends),
        ("torch.backends.mkldnn", torch.backends.mkldnn),
        ("torch.backends.mkldnn.conv", getattr(torch.backends.mkldnn, "conv", None)),
        ("torch.backends.mkldnn.matmul", getattr(torch.backends.mkldnn, "matmul", None)),
    )
    for name, owner in precisions:
        precision = getattr(owner, "fp32_precision", "none")
        if precision not in {"none", "ieee"}:
            return f'{name}.fp32_precision is {precision!r} (set it to "ieee")'
    if not bool(torch._C._get_mkldnn_enabled()):
        return (
            "mkldnn is off, and torch may then run convolutions by Winograd's algorithm, whose rounding is not bounded "
            "(set torch.backends.mkldnn.enabled = True)"
        )
    if float(torch.tensor([2.0**-140]) * 1.0) == 0:
        return "denormal numbers are flushed to zero (call torch.set_flush_denormal(False))"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on, and the rounding of half precision is not bounded (leave torch.autocast)"
    return None
