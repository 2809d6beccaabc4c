"""The seconds of a step on a GPU are those of the GPU's work, whenever the host reads them."""

from itertools import pairwise

import pytest
import torch

from qlora_dist.train.arrivals import Arrivals, seconds_between

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def test_a_step_has_its_own_seconds_however_late_it_is_read() -> None:
    """Five steps of 1, 1, 2, 3 and 4 sleeps are queued at once and read at once; the first is a cold one."""
    arrivals: Arrivals[int] = Arrivals(torch.device("cuda"))
    stamps = [arrivals.now()]
    for step in (1, 1, 2, 3, 4):
        torch.cuda._sleep(step * 50_000_000)
        arrivals.send(step, torch.zeros(1, device="cuda"))
    stamps += [stamp for *_, stamp in arrivals.take(everything=True)]
    _, first, *others = [seconds_between(before, after) for before, after in pairwise(stamps)]
    assert others == pytest.approx([2 * first, 3 * first, 4 * first], rel=0.1)
