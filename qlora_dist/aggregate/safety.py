"""What an island sends is not trusted: each contribution is checked before it counts."""

import math
import statistics
from collections.abc import Mapping, Sequence

from torch import Tensor

from qlora_dist.aggregate.changes import Contribution, norm_of

# With fewer other norms nobody can tell who of two is far out.
LEAST_NORMS = 2


def refuse(
    contribution: Contribution,
    reference: Mapping[str, Tensor],
    base: str,
    norms: Sequence[float] = (),
    most_times_median: float = 10.0,
) -> str | None:
    """Why a contribution must not count, as one sentence that names its island; None where it may.

    Args:
        reference: what it is a change of: the parameters that islands train, their shapes. Changes are float32.
        base: fingerprint of this run's base model.
        norms: of the round's other contributions and of those that counted in the last rounds
            (`outer.OuterState.known_norms`). With fewer than two of them norms are not judged.
        most_times_median: how many times the median of `norms` its norm may be; the median holds while fewer than half
            of them are false.
    """
    who = f"island {contribution.island}, round {contribution.round + 1}:"
    if contribution.base != base:
        return f"{who} its base model is another one (fingerprint {contribution.base[:12]}, not {base[:12]})"
    if contribution.tokens < 1:
        return f"{who} it was trained on {contribution.tokens} tokens"
    change = contribution.change
    if missing := sorted(reference.keys() - change.keys()):
        return f"{who} {len(missing)} parameters are missing, {missing[0]} among them"
    if unknown := sorted(change.keys() - reference.keys()):
        return f"{who} {len(unknown)} parameters are unknown here, {unknown[0]} among them"
    for name, tensor in reference.items():
        if change[name].shape != tensor.shape:
            shapes = f"{tuple(change[name].shape)} instead of {tuple(tensor.shape)}"
            return f"{who} the shape of {name} is {shapes}"
        if str(change[name].dtype) != "torch.float32":
            return f"{who} the dtype of {name} is {str(change[name].dtype).removeprefix('torch.')} instead of float32"
    if bad := sorted(name for name in reference if not bool(change[name].isfinite().all())):
        return f"{who} {len(bad)} of {len(reference)} parameters hold numbers that are not finite, {bad[0]} among them"
    # A learning rate that starts at zero leaves a round of zeros behind, of which nothing is a multiple.
    norms = [one for one in norms if one > 0]
    norm, usual = norm_of(change), statistics.median(norms) if len(norms) >= LEAST_NORMS else math.inf
    if not norm <= most_times_median * usual:
        return (
            f"{who} the norm of its change is {norm:.4g}, more than {most_times_median:g} times the usual {usual:.4g}"
        )
    return None


def refuse_round(
    contributions: Sequence[Contribution],
    reference: Mapping[str, Tensor],
    base: str,
    known_norms: Sequence[float] = (),
    most_times_median: float = 10.0,
) -> dict[int, str]:
    """Which of a round's contributions are refused: lease -> why.

    Norms are compared among those that are well otherwise, each with all the others and `known_norms`.
    """
    reasons = {one.lease: refuse(one, reference, base) for one in contributions}
    well = [one for one in contributions if reasons[one.lease] is None]
    norms = [norm_of(one.change) for one in well]
    for place, one in enumerate(well):
        others = [*norms[:place], *norms[place + 1 :], *known_norms]
        reasons[one.lease] = refuse(one, reference, base, others, most_times_median)
    return {lease: reason for lease, reason in reasons.items() if reason is not None}
