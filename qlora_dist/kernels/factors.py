"""LoRA factors into the buffers of an augmented GEMM: all parts of a projection joined, scaled, padded, cast, at once.

K: inputs  N: outputs of all parts  P: padded total rank  r: rank of a part
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from qlora_dist.kernels.launch import Kernel, runs_on_triton

if TYPE_CHECKING:
    import triton.language as tl

BLOCK = 1024
WARPS = 4
MOST_PARTS = 3


class Factors(NamedTuple):
    """A part's factors and where they belong.

    a_rK, b_Nr: contiguous, of one dtype. row, rank: the first output and the first column of the total rank.
    scale: what B is multiplied by, alpha / r.
    """

    a_rK: Tensor
    b_Nr: Tensor
    row: int
    rank: int
    scale: float


def place_factors(parts: Sequence[Factors], a_PK: Tensor, b_NP: Tensor) -> None:
    """Write A of all parts one below the other into `a_PK`, and scale * B block-diagonally into `b_NP`, zero elsewhere.

    `a_PK` and `b_NP` may have any row stride. Scaling is done in the factors' dtype, before the cast. At most three
    parts.
    """
    if not runs_on_triton(a_PK):
        a_PK.zero_()
        b_NP.zero_()
        for part in parts:
            r, n = len(part.a_rK), len(part.b_Nr)
            a_PK[part.rank : part.rank + r] = part.a_rK
            b_NP[part.row : part.row + n, part.rank : part.rank + r] = part.b_Nr * part.scale
        return
    if len(parts) > MOST_PARTS:
        raise ValueError(f"{len(parts)} parts; a projection has {MOST_PARTS} at most")
    (padded, inputs), outputs = a_PK.shape, b_NP.shape[0]
    # A part that is not there has no rows, so nothing of it is read.
    filled = [*parts, *[Factors(a_PK, b_NP, 0, 0, 0.0)] * (MOST_PARTS - len(parts))]
    ranks = [part.a_rK.shape[0] for part in parts] + [0] * (MOST_PARTS - len(parts))
    rows = [part.b_Nr.shape[0] for part in parts] + [0] * (MOST_PARTS - len(parts))
    (a0, b0, row0, rank0, s0), (a1, b1, row1, rank1, s1), (a2, b2, row2, rank2, s2) = filled
    _place[(-(-padded * inputs // BLOCK) + -(-outputs * padded // BLOCK),)](
        a0, a1, a2, b0, b1, b2, a_PK, b_NP, s0, s1, s2, inputs, outputs, a_PK.stride(0), b_NP.stride(0),
        rank0, rank1, rank2, row0, row1, row2,
        R0=ranks[0], R1=ranks[1], R2=ranks[2], N0=rows[0], N1=rows[1], N2=rows[2], P=padded, BLOCK=BLOCK,
        num_warps=WARPS,
    )  # fmt: skip


@Kernel
def _place(
    a0: tl.tensor,
    a1: tl.tensor,
    a2: tl.tensor,
    b0: tl.tensor,
    b1: tl.tensor,
    b2: tl.tensor,
    a_out: tl.tensor,
    b_out: tl.tensor,
    scale0: tl.tensor,
    scale1: tl.tensor,
    scale2: tl.tensor,
    inputs: tl.tensor,
    outputs: tl.tensor,
    a_stride: tl.tensor,
    b_stride: tl.tensor,
    rank0: tl.tensor,
    rank1: tl.tensor,
    rank2: tl.tensor,
    row0: tl.tensor,
    row1: tl.tensor,
    row2: tl.tensor,
    R0: tl.constexpr,
    R1: tl.constexpr,
    R2: tl.constexpr,
    N0: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The first programs write A, the rest B."""
    programs_a = tl.cdiv(P * inputs, BLOCK)
    program = tl.program_id(0)
    if program < programs_a:
        index = program * BLOCK + tl.arange(0, BLOCK)
        rank, column = index // inputs, index % inputs
        mask = index < P * inputs
        entry = tl.load(
            a0 + (rank - rank0) * inputs + column, mask=mask & (rank >= rank0) & (rank < rank0 + R0), other=0.0
        )
        if R1 > 0:
            entry += tl.load(
                a1 + (rank - rank1) * inputs + column, mask=mask & (rank >= rank1) & (rank < rank1 + R1), other=0.0
            )
        if R2 > 0:
            entry += tl.load(
                a2 + (rank - rank2) * inputs + column, mask=mask & (rank >= rank2) & (rank < rank2 + R2), other=0.0
            )
        tl.store(a_out + rank.to(tl.int64) * a_stride + column, entry.to(a_out.dtype.element_ty), mask=mask)
    else:
        index = (program - programs_a) * BLOCK + tl.arange(0, BLOCK)
        row, rank = index // P, index % P
        mask = index < outputs * P
        own = (row >= row0) & (row < row0 + N0) & (rank >= rank0) & (rank < rank0 + R0)
        value = tl.load(b0 + (row - row0) * R0 + rank - rank0, mask=mask & own, other=0.0) * scale0
        if R1 > 0:
            own = (row >= row1) & (row < row1 + N1) & (rank >= rank1) & (rank < rank1 + R1)
            value += tl.load(b1 + (row - row1) * R1 + rank - rank1, mask=mask & own, other=0.0) * scale1
        if R2 > 0:
            own = (row >= row2) & (row < row2 + N2) & (rank >= rank2) & (rank < rank2 + R2)
            value += tl.load(b2 + (row - row2) * R2 + rank - rank2, mask=mask & own, other=0.0) * scale2
        tl.store(b_out + row.to(tl.int64) * b_stride + rank, value.to(b_out.dtype.element_ty), mask=mask)
