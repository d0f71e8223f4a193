"""The delta form of Adasum: ranks step by themselves, then combine what each step changed.

A learning rate tuned for one process then does for many: changes in the same direction are averaged, others add up. Maleki et
al., "Scaling distributed training with adaptive summation", MLSys 2021.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from roundel.ops import Adasum
from roundel.process_sets import ProcessSet
from roundel.torch.allreduce import allreduce_async_
from roundel.torch.compression import Compressor

__all__ = ["combine_deltas", "starting_points"]


def starting_points(names: Mapping[torch.nn.Parameter, str]) -> dict[torch.nn.Parameter, torch.Tensor]:
    """Copies of the parameters, before a step."""
    return {p: p.detach().clone() for p in names}


@torch.no_grad()
def combine_deltas(
    before: Mapping[torch.nn.Parameter, torch.Tensor],
    names: Mapping[torch.nn.Parameter, str],
    compression: type[Compressor],
    process_set: ProcessSet,
) -> None:
    """Move every parameter from where it was by the Adasum of all ranks' moves, each parameter with coefficients of its own."""
    handles = []
    for p, start in before.items():
        wire, context = compression.compress(p.detach() - start)
        handle = allreduce_async_(wire, name=f"change of '{names[p]}'", op=Adasum, process_set=process_set)
        handles.append((p, start, handle, context))
    for p, start, handle, context in handles:
        p.copy_(start + compression.decompress(handle.wait(), context))
