"""Every worker holds everything; the adapter's gradients are summed over them, hidden behind the backward.

Gradients live in a flat fp32 buffer whose layout never changes, and are summed in a few parts of it. PyTorch's
DistributedDataParallel lays its buckets out anew after its first backward, so that a resumed run of three or more
workers would sum in another order than the uninterrupted one; and it averages, where a token-weighted loss needs the
sum.
"""

import torch.distributed as dist
from torch import Tensor, nn

from qlora_dist.model.adapter import trainable_parameters
from qlora_dist.shard.none import Unsharded
from qlora_dist.shard.strategy import OptimizerFactory

BUCKET_BYTES = 25 * 2**20


class Bucket:
    """A part of the flat gradient; its all-reduce starts when the last of its parameters has its gradient."""

    def __init__(self, parameters: list[nn.Parameter], flat: Tensor):
        self.parameters, self.flat = parameters, flat
        self.waiting_for: set[nn.Parameter] = set()
        self.work: dist.Work | None = None

    def start(self) -> None:
        """Begin the sum over workers."""
        self.work = dist.all_reduce(self.flat, async_op=True)


class DataParallel(Unsharded):
    """Sum of gradients over all workers, bucket by bucket, while the backward of earlier layers still runs."""

    def apply(self, model: nn.Module, make_optimizer: OptimizerFactory) -> nn.Module:
        """See `Strategy.apply`."""
        super().apply(model, make_optimizer)
        groups = self._groups(trainable_parameters(model))
        self.buckets = [
            Bucket(list(group.values()), flat) for group, flat in zip(groups, self.flat.groups, strict=True)
        ]
        self.next_bucket = len(self.buckets)
        for bucket in self.buckets:
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(lambda p, bucket=bucket: self._ready(bucket, p))
        return model

    def _groups(self, parameters: dict[str, nn.Parameter]) -> list[dict[str, nn.Parameter]]:
        """Parameters in the order in which a backward reaches them, cut into groups of bucket size."""
        groups: list[dict[str, nn.Parameter]] = []
        filled = 0
        for name, parameter in reversed(parameters.items()):
            size = parameter.numel() * parameter.element_size()
            if not groups or filled + size > BUCKET_BYTES:
                groups.append({})
                filled = 0
            groups[-1][name] = parameter
            filled += size
        return groups

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
            if bucket.work is not None:
                bucket.work.wait()
        return super().clip(max_norm, loss_scale)
