"""SyncBatchNorm: batch normalization whose mean and variance are those of all ranks' batches.

Ranks may have batches of different sizes, also empty ones: every element counts once.
"""

from __future__ import annotations

import torch
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from roundel import world
from roundel.ops import Sum
from roundel.torch.allgather import allgather_async
from roundel.torch.allreduce import allreduce_async

__all__ = ["SyncBatchNorm"]


def _per_channel(x: torch.Tensor) -> torch.Tensor:
    """(N, C, ...) as (C, N * ...)."""
    return x.transpose(0, 1).flatten(1)


def _statistics(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """How many elements a channel has on all ranks together, their mean and their variance (biased), by channel."""
    rows = _per_channel(x)
    count = rows.shape[1]
    mean = rows.mean(1) if count else rows.new_zeros(len(rows))
    squares = (rows - mean[:, None]).square().sum(1)  # about the rank's own mean: no cancellation
    mine = torch.cat([mean.new_tensor([count]), mean, squares])[None]
    everyones = allgather_async(mine, name="sync_batch_norm.forward").wait()
    counts, means, all_squares = everyones[:, :1], everyones[:, 1 : 1 + len(rows)], everyones[:, 1 + len(rows) :]
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    variance = (all_squares + counts * (means - mean).square()).sum(0) / total
    return total, mean, variance


class _SyncBatchNorm(torch.autograd.Function):
    """y = (x - mean) / sqrt(variance + eps) * weight + bias with everybody's mean and variance.

    Their part of the gradient is everybody's too; the gradients of weight and bias are this rank's, for the optimizer to
    reduce.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, mean, variance, total, eps):
        inverse = (variance + eps).rsqrt()
        shape = (1, -1, *(1 for _ in x.shape[2:]))
        normal = (x - mean.view(shape)) * inverse.view(shape)
        ctx.save_for_backward(normal, weight, inverse, total)
        if weight is not None:
            return normal * weight.view(shape) + bias.view(shape)
        return normal.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        normal, weight, inverse, total = ctx.saved_tensors
        shape = (1, -1, *(1 for _ in gradient.shape[2:]))
        sum_gradient = _per_channel(gradient).sum(1)
        sum_product = _per_channel(gradient * normal).sum(1)
        # Every rank takes part, also where nothing below this layer wants a gradient: the others may.
        sums = torch.stack([sum_gradient, sum_product])
        means = allreduce_async(sums, op=Sum, name="sync_batch_norm.backward").wait() / total
        along = gradient - means[0].view(shape) - normal * means[1].view(shape)
        scale = inverse if weight is None else inverse * weight
        of_weight, of_bias = (None, None) if weight is None else (sum_product, sum_gradient)
        return along * scale.view(shape), of_weight, of_bias, None, None, None, None


class SyncBatchNorm(_BatchNorm):
    """torch.nn.BatchNorm1d, 2d or 3d over the batches of all ranks, for training with few examples on each.

    Arguments as torch's: num_features, eps, momentum (None for a cumulative average), affine, track_running_stats.
    Input: shape (N, C, ...), on any device; N may differ between ranks, and be 0 on some. Statistics are computed in float32 at
    least. In evaluation running statistics are used, as in torch; there is no communication then.
    Raises ValueError (fewer than two dimensions, or one element in all), errors as allreduce.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats)

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")

    def _update(self, mean: torch.Tensor, variance: torch.Tensor, total: torch.Tensor) -> None:
        self.num_batches_tracked.add_(1)
        momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        unbiased = variance * (total / (total - 1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalize. While training, every rank calls this, layer by layer in the same order."""
        self._check_input_dim(input)
        if world.size() == 1:
            return self._alone(input)
        if not self.training and self.track_running_stats:
            return functional.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        x = input if input.dtype == torch.float64 else input.float()
        with torch.no_grad():
            total, mean, variance = _statistics(x.detach())
            if total < 2:
                raise ValueError(f"expected more than 1 value per channel when training, got {int(total)} on all ranks")
            if self.training and self.track_running_stats:
                self._update(mean, variance, total)
        weight, bias = (None, None) if self.weight is None else (self.weight.to(x.dtype), self.bias.to(x.dtype))
        return _SyncBatchNorm.apply(x, weight, bias, mean, variance, total, self.eps).to(input.dtype)

    def _alone(self, input: torch.Tensor) -> torch.Tensor:
        """In a job of one it is torch's."""
        return super().forward(input)
