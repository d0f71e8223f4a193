"""Making all ranks start from the same state."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from roundel.torch.ops import broadcast_async_
from roundel.world import communicator, rank

__all__ = ["broadcast_object", "broadcast_optimizer_state", "broadcast_parameters"]


def broadcast_parameters(params: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]], root_rank: int = 0) -> None:
    """Overwrite tensors with root's, in place.

    params: a state_dict, or (name, tensor) pairs such as model.named_parameters(); the same names, shapes and dtypes in the same
    order on every rank. Entries that are no tensors are skipped. Raises MismatchError naming the ranks and shapes.
    """
    pairs = params.items() if isinstance(params, Mapping) else params
    handles = [
        broadcast_async_(tensor, root_rank, name=f"parameter {name}")
        for name, tensor in pairs
        if isinstance(tensor, torch.Tensor)
    ]
    for handle in handles:
        handle.wait()


def broadcast_object(obj: Any, root_rank: int = 0, name: str | None = None) -> Any:
    """Root's object on every rank; root gets its own back.

    The object travels by pickle, which runs code of the sender's choice: ranks of a job trust each other, see SECURITY in the docs.
    """
    comm = communicator()
    label = name or "object"
    root = rank() == root_rank
    payload = torch.frombuffer(bytearray(pickle.dumps(obj)), dtype=torch.uint8) if root else None
    length = torch.tensor([payload.numel() if root else 0], dtype=torch.int64)
    comm.broadcast(length, root_rank, name=label + " size")
    if not root:
        payload = torch.empty(int(length), dtype=torch.uint8)
    comm.broadcast(payload, root_rank, name=label)
    return obj if root else pickle.loads(payload.numpy().tobytes())


@dataclass
class _Hole:
    """Where a tensor belongs in a state_dict that travels without its tensors."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    index: int


def _take_out(value: Any, tensors: list[torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        tensors.append(value.detach())
        return _Hole(tuple(value.shape), value.dtype, len(tensors) - 1)
    if isinstance(value, dict):
        return {key: _take_out(item, tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_take_out(item, tensors) for item in value)
    return value


def _put_in(value: Any, tensors: list[torch.Tensor]) -> Any:
    if isinstance(value, _Hole):
        return tensors[value.index]
    if isinstance(value, dict):
        return {key: _put_in(item, tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_put_in(item, tensors) for item in value)
    return value


def _holes(value: Any) -> list[_Hole]:
    if isinstance(value, _Hole):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [hole for item in items for hole in _holes(item)]


def broadcast_optimizer_state(optimizer: torch.optim.Optimizer, root_rank: int = 0) -> None:
    """Give every rank root's optimizer state and hyper-parameters. The other ranks' state may be empty or of other shapes.

    Tensors travel as tensors; numbers, names and structure by broadcast_object.
    """
    tensors: list[torch.Tensor] = []
    root = rank() == root_rank
    skeleton = broadcast_object(_take_out(optimizer.state_dict(), tensors) if root else None, root_rank, name="optimizer state")
    if not root:
        tensors = [torch.empty(hole.shape, dtype=hole.dtype) for hole in sorted(_holes(skeleton), key=lambda h: h.index)]
    handles = [broadcast_async_(t, root_rank, name=f"optimizer tensor {i}") for i, t in enumerate(tensors)]
    for handle in handles:
        handle.wait()
    if not root:
        optimizer.load_state_dict(_put_in(skeleton, tensors))
