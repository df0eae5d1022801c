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


SUMMED = ("F64", "F32", "F16", "BF16")
"""The dtypes of which `Sum` needs no help from the CPU, but for the bits of a NaN."""


class Sum:
    """`kernels.Sum` for tensors that are on a device already: call it with one per term."""

    def __init__(self, terms: Sequence[kernels.Term], out_dtype: str) -> None:
        self.on_cpu = kernels.Sum(terms, out_dtype)

    def __call__(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        if self.on_cpu.cast:
            return _narrow(inputs[0], self.on_cpu.out)
        return (_sum_fused if self.on_cpu.fused else _sum_wide)(self.on_cpu, inputs)


def linear_sum(
    inputs: Sequence[tuple[float, str, Any]], out_dtype: str, device: str
) -> np.ndarray[Any, Any]:
    """sum(c * x) on `device`, narrowed once, as bytes of `out_dtype` (1-D uint8).

    `inputs` are (coefficient, dtype, buffer); the buffers hold equally many elements. The bytes
    are those of `kernels.Sum`.
    """
    import torch

    total = Sum([(c, dtype) for c, dtype, _ in inputs], out_dtype)
    on_cpu = total.on_cpu
    views = [np.frombuffer(data, kernels.NUMPY[dtype]) for _, dtype, data in inputs]
    tensors = [
        _bits(view).to(device).view(torch_dtype(dtype))
        for view, (_, dtype) in zip(views, on_cpu.terms, strict=True)
    ]
    result = total(tensors)
    bits = getattr(torch, f"int{8 * result.element_size()}")
    out = result.view(bits).cpu().numpy().view(kernels.NUMPY[out_dtype])
    spoilt = torch.nonzero(torch.isnan(result.float())).flatten().cpu().numpy()
    for block in np.unique(spoilt // kernels.BLOCK):
        part = slice(block * kernels.BLOCK, (block + 1) * kernels.BLOCK)
        on_cpu(out[part].size, [view[part] for view in views], out[part])
    return out.view(np.uint8)


def _sum_fused(plan: kernels.Sum, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """A chain of fused multiply-adds in float32; elements that cancel once more in float64."""
    import torch

    coefficients = [float(np.float32(c)) for c, _ in plan.terms]
    total = inputs[0].float() * coefficients[0]
    for x, c in zip(inputs[1:], coefficients[1:], strict=True):
        total = (x.double() * c + total.double()).float()
    out = total.to(torch_dtype(plan.out))

    def sizes(x: torch.Tensor) -> torch.Tensor:
        if plan.codes == "F32":
            return (x.float().view(torch.int32) & 0x7FFFFFFF).long()
        return x.view(torch.int16).int() & 0x7FFF

    small = sizes(total if plan.codes == "F32" else out).clamp(min=plan.even)
    flags = torch.zeros_like(out, dtype=torch.bool)
    for x, lost in zip(inputs, plan.lost, strict=False):
        flags |= small + lost < sizes(x)
    again = torch.nonzero(flags).flatten()
    high = low = torch.zeros(again.shape, dtype=torch.float64, device=out.device)
    for x, (hi, lo) in zip(inputs, plan.exact, strict=True):
        x64 = x[again].double()
        high, low = high + x64 * hi, low + x64 * lo
    out[again] = (high + low).float().to(out.dtype)
    return out


def _sum_wide(plan: kernels.Sum, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Any number of terms in float64: one sum of the high pieces, one of the low ones."""
    total, *others = (tensor.double() for tensor in inputs)
    (hi, lo), *pieces = plan.exact
    low = total * lo
    if not others:
        total = total * hi
    for i, (x, (hi1, lo1)) in enumerate(zip(others, pieces, strict=True)):
        low = _blend(low, x, 1.0, lo1) if i else _blend(total, x, lo, lo1)
        total = _blend(total, x, 1.0 if i else hi, hi1)
    if any(lo for _, lo in plan.exact):
        total = total + low
    return total if plan.out == "F64" else _narrow(total.float(), plan.out)


def _narrow(x: torch.Tensor, dtype: str) -> torch.Tensor:
    """`x` rounded to `dtype`. torch makes numbers beyond fp8 e5m2 infinite; they saturate here."""
    import torch

    if dtype == "F8_E5M2":
        x = x.float()
        x = torch.where(torch.isinf(x), x, x.clamp(-57344.0, 57344.0))
    return x.to(torch_dtype(dtype))


def _blend(x: torch.Tensor, y: torch.Tensor, a: float, b: float) -> torch.Tensor:
    """a*x + b*y as `kernels.Backend.blend` has it: a coefficient 0 ignores its tensor."""
    return x * a + y * b if a and b else x * a if a or not b else y * b


@cache
def torch_dtype(dtype: str) -> Any:
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
