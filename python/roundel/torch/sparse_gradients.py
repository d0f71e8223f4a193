"""Sparse gradients of an optimizer's parameters on their way: each is gathered from all ranks as soon as it is ready."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from roundel.torch.buckets import Route
from roundel.torch.sparse import SparseHandle, sparse_allreduce_async

__all__ = ["SparseGradients"]


def _empty(param: torch.nn.Parameter, sparse_dim: int) -> torch.Tensor:
    indices = torch.empty((sparse_dim, 0), dtype=torch.int64, device=param.device)
    values = torch.empty((0, *param.shape[sparse_dim:]), dtype=param.dtype, device=param.device)
    return torch.sparse_coo_tensor(indices, values, param.shape, check_invariants=True)


class SparseGradients:
    """The parameters that have sparse gradients on some rank. Life of a step: start() for each, finish()."""

    def __init__(self, sparse_dims: Mapping[torch.nn.Parameter, int], names: Mapping[torch.nn.Parameter, str], route: Route):
        self._dims, self._names, self._route = dict(sparse_dims), names, route
        self._handles: dict[torch.nn.Parameter, SparseHandle] = {}
        self._given: dict[torch.nn.Parameter, tuple[torch.Tensor | None, int]] = {}

    def __contains__(self, param: torch.nn.Parameter) -> bool:
        return param in self._dims

    def __iter__(self) -> Iterator[torch.nn.Parameter]:
        return iter(self._dims)

    def _gather(self, param: torch.nn.Parameter, gradient: torch.Tensor | None) -> None:
        if gradient is None:
            gradient = _empty(param, self._dims[param])
        elif gradient.layout != torch.sparse_coo or gradient.sparse_dim() != self._dims[param]:
            gradient = gradient.to_dense().to_sparse(self._dims[param])
        name = f"gradient of {self._names[param]}{self._route.label}"
        self._handles[param] = sparse_allreduce_async(gradient, name, self._route.op, self._route.process_set)

    def start(self, param: torch.nn.Parameter) -> None:
        """Its gradient is ready, or there is none on this rank."""
        gradient = param.grad
        self._given[param] = (gradient, 0 if gradient is None else gradient._version)
        self._gather(param, None if gradient is None else gradient.detach())

    def start_rest(self, empty: bool = False) -> None:
        """The parameters that have not said anything yet. empty: the step is given up, their gradients are not to be used."""
        for param in self._dims:
            if param not in self._handles:
                self._gather(param, None) if empty else self.start(param)

    def changed(self) -> list[str]:
        """Which gradients were written to or replaced since they were given."""
        return [
            f"gradient of {self._names[param]}"
            for param, (gradient, version) in self._given.items()
            if param.grad is not gradient or (gradient is not None and gradient._version != version)
        ]

    def finish(self) -> None:
        """Wait for all; reduced gradients are in place, those that no rank has become None."""
        handles, self._handles, self._given = self._handles, {}, {}
        for param, handle in handles.items():
            reduced = handle()
            param.grad = reduced if reduced._nnz() else None
