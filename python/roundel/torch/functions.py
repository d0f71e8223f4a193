"""Making all ranks start from the same state."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from roundel.errors import RoundelError
from roundel.torch.agree import describe, require_same
from roundel.torch.ops import broadcast_async_
from roundel.world import communicator, rank

__all__ = ["broadcast_object", "broadcast_optimizer_state", "broadcast_parameters"]


def broadcast_parameters(params: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]], root_rank: int = 0) -> None:
    """Overwrite tensors with root's, in place.

    params: a state_dict, or (name, tensor) pairs such as model.named_parameters(); the same names, shapes and dtypes in the
    same order on every rank. Entries that are no tensors are skipped.
    Raises MismatchError on every rank, naming the first difference; nothing is overwritten then and the job can go on.
    """
    pairs = list(params.items() if isinstance(params, Mapping) else params)
    if any(not isinstance(pair, tuple) or len(pair) != 2 for pair in pairs):
        raise ValueError("broadcast_parameters: expected a state_dict or (name, tensor) pairs such as model.named_parameters()")
    pairs = [(name, tensor) for name, tensor in pairs if isinstance(tensor, torch.Tensor)]
    require_same("broadcast_parameters", [describe(name, tensor) for name, tensor in pairs])
    handles = [broadcast_async_(tensor, root_rank, name=f"parameter {name}") for name, tensor in pairs]
    for handle in handles:
        handle.wait()


def broadcast_object(obj: Any, root_rank: int = 0, name: str | None = None) -> Any:
    """Root's object on every rank; root gets its own back.

    The object travels by pickle, which runs code of the sender's choice: ranks of a job trust each other, see SECURITY in the
    docs. What pickle raises on root is raised there, and a RoundelError elsewhere; the job can go on.
    """
    comm = communicator()
    label = name or "object"
    root = rank() == root_rank
    payload, length, problem = None, -1, None
    if root:
        try:
            payload = torch.frombuffer(bytearray(pickle.dumps(obj)), dtype=torch.uint8)
            length = payload.numel()
        except Exception as e:
            problem = e
    length = int(comm.broadcast(torch.tensor([length]), root_rank, name=label + " size"))
    if problem is not None:
        raise problem
    if length < 0:
        raise RoundelError(f"rank {rank()}: broadcast_object: rank {root_rank} could not pickle its object")
    if payload is None:
        payload = torch.empty(length, dtype=torch.uint8)
    comm.broadcast(payload, root_rank, name=label)
    return obj if root else pickle.loads(payload.numpy())


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


def broadcast_optimizer_state(optimizer: torch.optim.Optimizer, root_rank: int = 0) -> None:
    """Give every rank root's optimizer state and hyper-parameters. The other ranks' state may be empty or of other shapes.

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
    state = broadcast_object(_map(optimizer.state_dict(), take_out) if root else None, root_rank, name="optimizer state")
    if not root:
        state = _map(state, put_in)
    handles = [broadcast_async_(t, root_rank, name=f"optimizer tensor {i}") for i, t in enumerate(tensors)]
    for handle in handles:
        handle.wait()
    if not root:
        optimizer.load_state_dict(state)
