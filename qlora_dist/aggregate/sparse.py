"""Methods that drop most of each update before they add them: TIES, DARE, DELLA.

They go through a layer in blocks of rows, so that of however many adapters only a block each is in memory, beside the
result.

Shape suffixes: N outputs of the adapted layer, K its inputs, q the rank of the result, s the columns of a sketch.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from qlora_dist.aggregate.products import Projection, split_evenly

MajoritySign = Literal["total", "frequency", "none"]
Rows = Callable[[int, int], Tensor]
BLOCK_ROWS = 512
# Up to this smaller side a whole SVD takes at most seconds on a CPU core.
WHOLE_SVD_UP_TO = 1024
POWER_ITERATIONS = 8


def trim_threshold(tensor: Tensor, density: float) -> float:
    """The smallest magnitude that TIES keeps (arXiv:2306.01708, section 4): that of the int(density * number)th.

    As in PEFT; but of entries of equal magnitude all stay, or none.
    """
    kept = int(density * tensor.numel())
    return float(tensor.abs().flatten().kthvalue(tensor.numel() - kept + 1).values) if kept else math.inf


def trimmed(tensor: Tensor, threshold: float) -> Tensor:
    """The entries of at least that magnitude; the others 0."""
    return torch.where(tensor.abs() >= threshold, tensor, 0.0)


def dropped(tensor: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Each entry with probability `density`, divided by it; the others 0 (DARE, arXiv:2311.03099, equation 1)."""
    return _sampled(tensor, torch.full_like(tensor, density), generator)


def dropped_by_magnitude(tensor: Tensor, density: float, epsilon: float, generator: torch.Generator) -> Tensor:
    """Each entry with its own probability, divided by it; the others 0 (DELLA's MagPrune, arXiv:2406.11617).

    Within a row the probability of staying rises with the rank of the magnitude, in even steps from density -
    epsilon / 2 for the smallest to density + epsilon / 2 for the largest, so that its mean is `density`.
    """
    order = tensor.abs().argsort(dim=1, stable=True)
    steps = torch.linspace(0, 1, tensor.shape[1], dtype=tensor.dtype, device=tensor.device).expand_as(tensor)
    share = torch.empty_like(tensor).scatter_(1, order, steps)
    return _sampled(tensor, density + epsilon * (share - 0.5), generator)


def _sampled(tensor: Tensor, kept: Tensor, generator: torch.Generator) -> Tensor:
    # Drawn on the CPU, so that the result does not depend on the device.
    drawn = torch.rand(tensor.shape, generator=generator).to(tensor.device)
    return torch.where(drawn < kept, tensor / kept, 0.0)


def generator_of(*names: object) -> torch.Generator:
    """A generator on the CPU whose draws depend on `names` alone."""
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def added(rows: Sequence[Rows], weights: Sequence[float], majority_sign: MajoritySign, num_rows: int) -> Tensor:
    """The weighted sum, or for each entry that of the tensors that have its majority sign, divided by their number.

    The second is TIES' election and disjoint merge (arXiv:2306.01708, section 4) with PEFT's weights: the majority is
    that of the unweighted values (`total`) or signs (`frequency`), positive where these cancel out, and zeros neither
    vote nor count. `none` is the plain sum.

    Args:
        rows: of each tensor, a function that gives its rows from one number to below another; called once for each
            block of 512.
        weights: one for each, taken as given.
        num_rows: of each tensor.
    """
    blocks = []
    for begin in range(0, num_rows, BLOCK_ROWS):
        tensors = [make(begin, min(begin + BLOCK_ROWS, num_rows)) for make in rows]
        weighted = [tensor * weight for tensor, weight in zip(tensors, weights, strict=True)]
        if majority_sign == "none":
            blocks.append(torch.stack(weighted).sum(0))
            continue
        votes = torch.stack(tensors if majority_sign == "total" else [tensor.sign() for tensor in tensors]).sum(0)
        majority = torch.where(votes >= 0, 1.0, -1.0)
        agrees = torch.stack([tensor.sign() == majority for tensor in tensors])
        blocks.append((torch.stack(weighted) * agrees).sum(0) / agrees.sum(0).clamp(min=1))
    return torch.cat(blocks)


def projected(matrix_NK: Tensor, rank: int, generator: torch.Generator) -> Projection:
    """The nearest matrix of rank `rank` as factors of scale 1, split as `mean_of_products` does.

    By a whole SVD where the smaller side is at most 1024; else by subspace iteration from a random start of 2 * rank
    + 16 columns and 8 rounds (Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1), whose error in the kept part
    falls with the 17th power of the ratio of the singular values beyond the sketch to those kept. `lost` is that of
    the result in either case.
    """
    num_outputs, num_inputs = matrix_NK.shape
    width, smaller = 2 * rank + 16, min(num_outputs, num_inputs)
    if smaller <= max(WHOLE_SVD_UP_TO, width):
        u_Ns, values_s, v_sK = torch.linalg.svd(matrix_NK, full_matrices=False)
    else:
        sketch_Ns = matrix_NK @ torch.randn(num_inputs, width, generator=generator).to(matrix_NK)
        for _ in range(POWER_ITERATIONS):
            basis_Ks = torch.linalg.qr(matrix_NK.T @ torch.linalg.qr(sketch_Ns).Q).Q
            sketch_Ns = matrix_NK @ basis_Ks
        basis_Ns = torch.linalg.qr(sketch_Ns).Q
        left_ss, values_s, v_sK = torch.linalg.svd(basis_Ns.T @ matrix_NK, full_matrices=False)
        u_Ns = basis_Ns @ left_ss
    kept = min(rank, smaller)
    a_qK, b_Nq = split_evenly(u_Ns[:, :kept], values_s[:kept], v_sK[:kept], rank, 1.0)
    norm, cut = float(matrix_NK.norm()), float((matrix_NK - b_Nq @ a_qK).norm())
    return Projection(a_qK, b_Nq, cut / norm if norm else 0.0, norm)
