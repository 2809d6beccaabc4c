"""Which tensors go to Triton, and kernels that are compiled by it only once one does."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def runs_on_triton(x: Tensor) -> bool:
    """Whether the kernel takes `x`: on CUDA, or on a CPU under TRITON_INTERPRET=1; float64 is the references' alone."""
    return x.dtype != torch.float64 and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")


def compute_dtype(x: Tensor) -> torch.dtype:
    """What the references compute in: float32 as the kernels, float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class Kernel:
    """A function in Triton's language that is handed to `triton.jit` at its first launch: `kernel[grid](...)`.

    Importing Triton takes a second and a CPU may have none; so the modules import without it, and the name `tl`
    that their kernels use is put into their globals here. In a kernel's signature Triton reads `tl.constexpr` alone;
    `tl.tensor` is a pointer or a number.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function
        self._jit: Any = None

    @property
    def jit(self) -> Any:
        if self._jit is None:
            import triton
            import triton.language

            self.function.__globals__["tl"] = triton.language
            self._jit = triton.jit(self.function)
        return self._jit

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        launch: Callable[..., Any] = self.jit[grid]
        return launch


def power_of_two_from(n: int) -> int:
    """The smallest power of two that is at least `n`: Triton's block shapes are such."""
    return 1 << max(n - 1, 0).bit_length()
