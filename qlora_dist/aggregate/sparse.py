"""Methods that drop most of each update before they add them: TIES, DARE, DELLA.

They take tensors one after another and as often as they need them, so that two or three of the layer's size are in
memory however many adapters there are.

Shape suffixes: N outputs of the adapted layer, K its inputs, q the rank of the result, s the columns of a sketch.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from qlora_dist.aggregate.products import Projection, split_evenly

MajoritySign = Literal["total", "frequency", "none"]
# Up to this smaller side a whole SVD takes at most seconds on a CPU core.
WHOLE_SVD_UP_TO = 1024
POWER_ITERATIONS = 8


def trimmed(tensor: Tensor, density: float) -> Tensor:
    """The `density` of the entries that are largest in magnitude; the others 0 (TIES, arXiv:2306.01708, section 4).

    int(density * number) entries stay, as in PEFT, and with them all that are as large as the smallest of these.
    """
    kept = int(density * tensor.numel())
    if kept == 0:
        return torch.zeros_like(tensor)
    magnitudes = tensor.abs()
    threshold = magnitudes.flatten().kthvalue(tensor.numel() - kept + 1).values
    return torch.where(magnitudes >= threshold, tensor, 0.0)


def dropped(tensor: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Each entry with probability `density`, divided by it; the others 0 (DARE, arXiv:2311.03099, equation 1)."""
    return _sampled(tensor, torch.full_like(tensor, density), generator)


def dropped_by_magnitude(tensor: Tensor, density: float, epsilon: float, generator: torch.Generator) -> Tensor:
    """Each entry with its own probability, divided by it; the others 0 (DELLA's MagPrune, arXiv:2406.11617).

    Within a row the probability of staying rises with the rank of the magnitude, in even steps from density -
    epsilon / 2 for the smallest to density + epsilon / 2 for the largest, so that its mean is `density`.
    """
    ranks = tensor.abs().argsort(dim=1, stable=True).argsort(dim=1)
    share = ranks.to(tensor.dtype) / max(tensor.shape[1] - 1, 1)
    return _sampled(tensor, density + epsilon * (share - 0.5), generator)


def _sampled(tensor: Tensor, kept: Tensor, generator: torch.Generator) -> Tensor:
    # Drawn on the CPU, so that the result does not depend on the device.
    drawn = torch.rand(tensor.shape, generator=generator).to(tensor.device)
    return torch.where(drawn < kept, tensor / kept, 0.0)


def generator_of(*names: object) -> torch.Generator:
    """A generator on the CPU whose draws depend on `names` alone."""
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def added(tensors: Sequence[Callable[[], Tensor]], weights: Sequence[float], majority_sign: MajoritySign) -> Tensor:
    """The weighted sum, or for each entry that of the tensors that have its majority sign, divided by their number.

    The second is TIES' election and disjoint merge (arXiv:2306.01708, section 4) with PEFT's weights: the majority is
    that of the unweighted values (`total`) or signs (`frequency`), positive where these cancel out, and zeros neither
    vote nor count. `none` is the plain sum.

    Args:
        tensors: each gives the same tensor whenever it is called; called once or twice.
        weights: one for each, taken as given.
    """
    if majority_sign == "none":
        return sum((make() * weight for make, weight in zip(tensors, weights, strict=True)), start=torch.zeros(()))
    votes = sum((make() if majority_sign == "total" else make().sign() for make in tensors), start=torch.zeros(()))
    majority = torch.where(votes >= 0, 1, -1).to(torch.int8)
    del votes
    total, count = torch.zeros(majority.shape), torch.zeros(majority.shape)
    total, count = total.to(majority.device), count.to(majority.device)
    for make, weight in zip(tensors, weights, strict=True):
        tensor = make()
        agrees = tensor.sign() == majority
        total += torch.where(agrees, tensor * weight, 0.0)
        count += agrees
    return total / count.clamp_(min=1.0)


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
