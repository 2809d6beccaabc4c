"""Every worker holds everything; the adapter's gradients are summed over them, hidden behind the backward.

Gradients live in a few flat fp32 buffers whose layout never changes. PyTorch's DistributedDataParallel lays its buckets
out anew after its first backward, so that a resumed run of three or more workers would sum in another order than the
uninterrupted one; and it averages, where a token-weighted loss needs the sum.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qlora_dist.shard.none import Unsharded, clip_gradients
from qlora_dist.shard.strategy import OptimizerFactory

BUCKET_BYTES = 25 * 2**20


class Bucket:
    """A flat gradient buffer; its all-reduce starts when the last of its parameters has its gradient."""

    def __init__(self, parameters: list[nn.Parameter]):
        size = sum(p.numel() for p in parameters)
        self.flat = torch.zeros(size, dtype=parameters[0].dtype, device=parameters[0].device)
        self.parameters = parameters
        self.waiting_for: set[nn.Parameter] = set()
        self.work: dist.Work | None = None
        offset = 0
        for parameter in parameters:
            parameter.grad = self.flat[offset : offset + parameter.numel()].view_as(parameter)
            offset += parameter.numel()

    def start(self) -> None:
        """Begin the sum over workers."""
        self.work = dist.all_reduce(self.flat, async_op=True)


class DataParallel(Unsharded):
    """Sum of gradients over all workers, bucket by bucket, while the backward of earlier layers still runs."""

    def apply(self, model: nn.Module, make_optimizer: OptimizerFactory) -> nn.Module:
        """See `Strategy.apply`."""
        super().apply(model, make_optimizer)
        self.buckets = [Bucket(group) for group in _groups(list(self.parameters.values()))]
        self.next_bucket = len(self.buckets)
        for bucket in self.buckets:
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(lambda p, bucket=bucket: self._ready(bucket, p))
        return model

    def backward(self, loss: Tensor, last_micro_batch: bool) -> None:
        """See `Strategy.backward`."""
        if last_micro_batch:
            self.next_bucket = 0
            for bucket in self.buckets:
                bucket.waiting_for = set(bucket.parameters)
        loss.backward()

    def _ready(self, bucket: Bucket, parameter: nn.Parameter) -> None:
        if self.next_bucket == len(self.buckets):
            return
        bucket.waiting_for.discard(parameter)
        # Collectives must start in the same order on every rank, so a bucket that is complete early waits its turn.
        while self.next_bucket < len(self.buckets) and not self.buckets[self.next_bucket].waiting_for:
            self.buckets[self.next_bucket].start()
            self.next_bucket += 1

    def clip(self, max_norm: float, loss_scale: float) -> Tensor:
        """See `Strategy.clip`."""
        # A parameter that this step never used (an expert no token chose) leaves its bucket unstarted.
        for bucket in self.buckets[self.next_bucket :]:
            bucket.start()
        self.next_bucket = len(self.buckets)
        for bucket in self.buckets:
            assert bucket.work is not None
            bucket.work.wait()
        return clip_gradients([bucket.flat for bucket in self.buckets], max_norm, loss_scale)

    def step(self, skip: bool) -> None:
        """See `Strategy.step`."""
        if not skip:
            self.optimizer.step()
        for bucket in self.buckets:
            bucket.flat.zero_()


def _groups(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters in the order in which a backward reaches them, cut into groups of one dtype and of bucket size."""
    groups: list[list[nn.Parameter]] = []
    filled = 0
    for parameter in reversed(parameters):
        size = parameter.numel() * parameter.element_size()
        if not groups or filled + size > BUCKET_BYTES or groups[-1][0].dtype != parameter.dtype:
            groups.append([])
            filled = 0
        groups[-1].append(parameter)
        filled += size
    return groups
