"""Checking that ranks were given the same things, before bytes travel that could not tell."""

from __future__ import annotations

import hashlib
import itertools
import json

import torch

from roundel.errors import MismatchError
from roundel.process_sets import ProcessSet, global_process_set
from roundel.torch.allgather import allgather
from roundel.world import rank

__all__ = ["describe", "gather_bytes", "require_same"]


def describe(name: str, tensor: torch.Tensor) -> str:
    """ "'fc.weight' (float32 of shape (10, 4))" """
    return f"'{name}' ({str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)})"


def _bytes(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def gather_bytes(data: bytes | None, name: str, process_set: ProcessSet = global_process_set) -> dict[int, bytes | None]:
    """Everybody's bytes by rank; None from a rank that has none to give. Ranks that have joined are missing."""
    mine = torch.tensor([[rank(), -1 if data is None else len(data)]], dtype=torch.int64)
    lengths = allgather(mine, f"{name}: lengths", process_set).tolist()
    joined = allgather(_bytes(data or b""), name, process_set).numpy().tobytes()
    ends = itertools.accumulate(max(length, 0) for _, length in lengths)
    return {r: None if n < 0 else joined[end - n : end] for (r, n), end in zip(lengths, ends, strict=True)}


def require_same(what: str, mine: list[str], process_set: ProcessSet = global_process_set) -> None:
    """Raise MismatchError on every rank, naming the first difference, unless all have the same texts. The job can go on.

    Costs one all-gather of 32 bytes where they are the same.
    """
    text = json.dumps(mine).encode()
    digests = allgather(_bytes(hashlib.sha256(text).digest()), f"{what}: digest", process_set).view(-1, 32)
    if bool((digests == digests[0]).all()):
        return
    texts = gather_bytes(text, f"{what}: texts", process_set)
    lists = {r: json.loads(theirs) for r, theirs in texts.items()}
    first = min(lists)
    for entries in itertools.zip_longest(*lists.values(), fillvalue="nothing more"):
        for other, entry in zip(lists, entries, strict=True):
            if entry != entries[0]:
                raise MismatchError(f"rank {rank()}: {what}: rank {first} has {entries[0]} where rank {other} has {entry}")
