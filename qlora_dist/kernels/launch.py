"""Which tensors go to Triton, and kernels that are compiled by it only once one does."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Of launches with sizes of their own: ragged data has many.
MOST_KNOWN = 4096


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

    Constants and options are passed by name, everything else by place. Triton looks at every argument anew for each
    launch, some 40 us, of which a step has two thousand; so what it compiled is kept here by what it specialises for.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function
        self._jit: Any = None
        self._compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}

    @property
    def jit(self) -> Any:
        if self._jit is None:
            import triton
            import triton.language

            self.function.__globals__["tl"] = triton.language
            self._jit = triton.jit(self.function)
        return self._jit

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def launch(*args: Any, **named: Any) -> None:
            device = _device_of(args)
            if device < 0:
                self.jit[grid](*args, **named)
                return
            key = _specialisation(device, args, named)
            known = self._compiled.get(key)
            if known is None:
                # Triton launches on the current device, which may be another one.
                with torch.cuda.device(device):
                    compiled = self.jit[grid](*args, **named)
                constants = tuple(named[name] for name in self.jit.arg_names[len(args) :])
                if len(self._compiled) >= MOST_KNOWN:
                    self._compiled.clear()
                self._compiled[key] = compiled, constants
                return
            compiled, constants = known
            x, y, z = (*grid, 1, 1)[:3]
            stream = torch._C._cuda_getCurrentRawStream(device)
            compiled.run(
                x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None, *args, *constants
            )

        return launch


def _device_of(args: tuple[Any, ...]) -> int:
    """The number of the GPU that the first tensor is on; -1 for a CPU."""
    for arg in args:
        if isinstance(arg, Tensor):
            return arg.get_device()
    return -1


def _specialisation(device: int, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
    """Finer than what Triton compiles for: dtypes and alignments, and whole numbers themselves."""
    key: list[Any] = [device, *named.values()]
    for arg in args:
        if isinstance(arg, Tensor):
            key.append(arg.dtype)
            key.append(arg.data_ptr() & 15)
        else:
            key.append(float if type(arg) is float else arg)
    return tuple(key)


def power_of_two_from(n: int) -> int:
    """The smallest power of two that is at least `n`: Triton's block shapes are such."""
    return 1 << max(n - 1, 0).bit_length()
