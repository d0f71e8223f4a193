"""Making all ranks start from the same state, and exchanging Python objects."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from roundel.errors import InvalidArgumentError
from roundel.objects import allgather_object, broadcast_object, broadcast_object_fn
from roundel.process_sets import ProcessSet, global_process_set
from roundel.torch.agree import describe, require_same
from roundel.torch.broadcast import broadcast_async_
from roundel.world import rank

__all__ = [
    "allgather_object",
    "broadcast_object",
    "broadcast_object_fn",
    "broadcast_optimizer_state",
    "broadcast_parameters",
]


def _named(params: Any) -> list[tuple[str, torch.Tensor]]:
    """(name, tensor) for each tensor; those without names are numbered, mappings are sorted."""
    if isinstance(params, Mapping):
        pairs = sorted(params.items(), key=lambda pair: str(pair[0]))
    elif isinstance(params, Iterable) and not isinstance(params, (str, bytes, torch.Tensor)):
        pairs = [(str(i), p) if isinstance(p, torch.Tensor) or p is None else p for i, p in enumerate(params)]
    else:
        pairs = [params]
    if any(not isinstance(pair, tuple) or len(pair) != 2 for pair in pairs):
        raise InvalidArgumentError(
            "broadcast_parameters: expected a state_dict, (name, tensor) pairs such as model.named_parameters(), or tensors"
        )
    return [(name, tensor) for name, tensor in pairs if isinstance(tensor, torch.Tensor)]


def broadcast_parameters(
    params: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]] | Iterable[torch.Tensor],
    root_rank: int = 0,
    process_set: ProcessSet = global_process_set,
) -> None:
    """Overwrite tensors with root's, in place.

    params: a state_dict, (name, tensor) pairs such as model.named_parameters(), or tensors such as model.parameters(); the same
    names, shapes and dtypes on every rank. Entries that are no tensors are skipped.
    Raises MismatchError on every rank, naming the first difference; nothing is overwritten then and the job can go on.
    """
    pairs = _named(params)
    require_same("broadcast_parameters", [describe(name, tensor) for name, tensor in pairs], process_set)
    handles = [broadcast_async_(tensor, root_rank, f"parameter {name}", process_set) for name, tensor in pairs]
    for handle in handles:
        handle.wait()


@dataclass
class _Hole:
    """Where a tensor belongs in a state_dict that travels without its tensors."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def _map(value: Any, change: Callable[[Any], Any]) -> Any:
    """The same structure of dicts, lists and tuples with its leaves changed, in a fixed order."""
    if isinstance(value, dict):
        return {key: _map(item, change) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(item, change) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_map(item, change) for item in value)
    return change(value)


def broadcast_optimizer_state(
    optimizer: torch.optim.Optimizer, root_rank: int = 0, model: Any = None, process_set: ProcessSet = global_process_set
) -> None:
    """Give every rank root's optimizer state and hyper-parameters. The other ranks' state may be empty or of other shapes.

    model: not needed here; Horovod looks for sparse parameters in it.
    Tensors travel as tensors; numbers, names and structure by broadcast_object. Ranks other than root take them by
    load_state_dict(), which raises ValueError where the parameter groups are not root's.
    """
    tensors: list[torch.Tensor] = []

    def take_out(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        tensors.append(leaf.detach())
        return _Hole(tuple(leaf.shape), leaf.dtype)

    def put_in(leaf: Any) -> Any:
        if not isinstance(leaf, _Hole):
            return leaf
        tensors.append(torch.empty(leaf.shape, dtype=leaf.dtype))
        return tensors[-1]

    root = rank() == root_rank
    state = broadcast_object(
        _map(optimizer.state_dict(), take_out) if root else None, root_rank, name="optimizer state", process_set=process_set
    )
    if not root:
        state = _map(state, put_in)
    handles = [broadcast_async_(t, root_rank, f"optimizer tensor {i}", process_set) for i, t in enumerate(tensors)]
    for handle in handles:
        handle.wait()
    if not root:
        optimizer.load_state_dict(state)
