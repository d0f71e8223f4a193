"""The delta form of Adasum: ranks step by themselves, then combine what each step changed.

A learning rate tuned for one process then does for many: changes in the same direction are averaged, others add up. Maleki et
al., "Scaling distributed training with adaptive summation", MLSys 2021.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from roundel.ops import Adasum
from roundel.process_sets import ProcessSet
from roundel.torch.allreduce import grouped_allreduce_
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
    by_device: dict[torch.device, list[torch.nn.Parameter]] = {}
    for p in before:
        by_device.setdefault(p.device, []).append(p)
    for params in by_device.values():
        pairs = [compression.compress(p.detach() - before[p]) for p in params]
        name = f"changes of '{names[params[0]]}' to '{names[params[-1]]}'"
        moves = grouped_allreduce_([wire for wire, _ in pairs], name=name, op=Adasum, process_set=process_set)
        for p, move, (_, context) in zip(params, moves, pairs, strict=True):
            p.copy_(before[p] + compression.decompress(move, context))
