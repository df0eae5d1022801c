"""Linear sums on a GPU, by torch, with the bytes that `kernels.Sum` gives on the CPU.

The pieces of the coefficients are `kernels.Sum`'s own. No product rounds, and additions and casts
are what IEEE 754 defines to the last bit, so any device agrees. What the standard leaves open is
the bits of a NaN: blocks that hold one are computed once more on the CPU, and so are those with a
number beyond float8 e4m3, which torch turns into NaN. torch is imported inside the functions only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from plymix import kernels
from plymix.errors import Refusal

if TYPE_CHECKING:
    import torch

INSTALL = 'pip install "plymix[torch]" with a CUDA build of torch (https://pytorch.org says how)'

_DEVICE = re.compile(r"cpu|cuda(?::(\d{1,4}))?")


def require(device: str) -> None:
    """Raises Refusal when `device` ("cpu", "cuda", "cuda:1") cannot be used, and what to do."""
    match = _DEVICE.fullmatch(device)
    if match is None:
        raise Refusal(f"unknown device {device!r}; use cpu, cuda, or cuda:1 for the second GPU")
    if device == "cpu":
        return
    try:
        import torch
    except ImportError:
        raise Refusal(f"--device {device} needs torch, which is not installed: {INSTALL}") from None
    if not torch.cuda.is_available():
        raise Refusal(
            f"--device {device}: torch {torch.__version__} sees no CUDA device here; use"
            f" --device cpu, or {INSTALL}"
        )
    count = torch.cuda.device_count()
    if int(match[1] or 0) >= count:
        raise Refusal(f"there is no {device}: torch sees {count}, cuda:0 to cuda:{count - 1}")


def to_device(array: np.ndarray[Any, Any], device: str) -> torch.Tensor:
    """A numpy array as a float32 tensor on `device`."""
    import torch

    return torch.from_numpy(_writable(array)).to(device=device, dtype=torch.float32)


def linear_sum(
    inputs: Sequence[tuple[float, str, Any]], out_dtype: str, device: str
) -> np.ndarray[Any, Any]:
    """sum(c * x) on `device`, narrowed once, as bytes of `out_dtype` (1-D uint8).

    `inputs` are (coefficient, dtype, buffer); the buffers hold equally many elements. The bytes
    are those of `kernels.Sum`.
    """
    import torch

    on_cpu = kernels.Sum([(c, dtype) for c, dtype, _ in inputs], out_dtype)
    views = [np.frombuffer(data, kernels.NUMPY[dtype]) for _, dtype, data in inputs]
    tensors = [
        _bits(view).to(device).view(_torch_dtype(dtype))
        for view, (_, dtype) in zip(views, on_cpu.terms, strict=True)
    ]
    result = (_sum_narrow if on_cpu.narrow else _sum_wide)(on_cpu, tensors)
    bits = getattr(torch, f"int{8 * result.element_size()}")
    out = result.view(bits).cpu().numpy().view(kernels.NUMPY[out_dtype])
    spoilt = torch.nonzero(torch.isnan(result.float())).flatten().cpu().numpy()
    for block in np.unique(spoilt // kernels.BLOCK):
        part = slice(block * kernels.BLOCK, (block + 1) * kernels.BLOCK)
        on_cpu(out[part].size, [view[part] for view in views], out[part])
    return out.view(np.uint8)


def _sum_narrow(plan: kernels.Sum, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Two terms in float32; those that cancel once more in float64."""
    import torch

    x, y = (tensor.float() for tensor in inputs)
    (hi0, lo0), (hi1, lo1) = plan._pieces
    total = _blend(x, y, hi0, hi1)
    if lo0 or lo1:
        total = total + _blend(x, y, lo0, lo1)
    out = total.to(_torch_dtype(plan.out))
    first, found = (t.view(torch.int16).int() & 0x7FFF for t in (inputs[0], out))
    again = torch.nonzero(found + int(plan._lost) < first).flatten()
    (hi0, lo0), (hi1, lo1) = plan._exact
    x64, y64 = x[again].double(), y[again].double()
    exact = (x64 * hi0 + y64 * hi1) + (x64 * lo0 + y64 * lo1)
    out[again] = exact.float().to(out.dtype)
    return out


def _sum_wide(plan: kernels.Sum, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Any number of terms in float64: one sum of the high pieces, one of the low ones."""
    total, *others = (tensor.double() for tensor in inputs)
    (hi, lo), *pieces = plan._exact
    low = total * lo
    if not others:
        total = total * hi
    for i, (x, (hi1, lo1)) in enumerate(zip(others, pieces, strict=True)):
        low = _blend(low, x, 1.0, lo1) if i else _blend(total, x, lo, lo1)
        total = _blend(total, x, 1.0 if i else hi, hi1)
    if any(lo for _, lo in plan._exact):
        total = total + low
    return total if plan.out == "F64" else total.float().to(_torch_dtype(plan.out))


def _blend(x: torch.Tensor, y: torch.Tensor, a: float, b: float) -> torch.Tensor:
    """a*x + b*y as `kernels.Backend.blend` has it: a coefficient 0 ignores y."""
    return x * a + y * b if b else x * a


@cache
def _torch_dtype(dtype: str) -> Any:
    import torch

    return {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
        "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    }[dtype]  # fmt: skip


def _bits(view: np.ndarray[Any, Any]) -> torch.Tensor:
    """The bits of an array as signed integers, which every torch can hold."""
    import torch

    return torch.from_numpy(_writable(view.view(f"i{view.itemsize}")))


def _writable(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """torch takes no read-only or oddly strided arrays."""
    return np.require(array, requirements=("C", "W"))
