"""Reduction operators, under Horovod's names."""

from __future__ import annotations

import enum

from roundel.errors import InvalidArgumentError

__all__ = ["Adasum", "Average", "Max", "Min", "Product", "ReduceOp", "Sum", "choose_op"]


class ReduceOp(enum.IntEnum):
    """How values of different ranks become one. The numbers are those of csrc/base/dtype.h."""

    Sum = 0
    Average = 1
    Min = 2
    Max = 3
    Product = 4
    Adasum = 5  # a pair of gradients adds where they are orthogonal and averages where they are parallel; of the engine only


Sum = ReduceOp.Sum
Average = ReduceOp.Average
Min = ReduceOp.Min
Max = ReduceOp.Max
Product = ReduceOp.Product
Adasum = ReduceOp.Adasum


def choose_op(average: bool | None, op: ReduceOp | None, what: str) -> ReduceOp:
    """The operator that `average`, which Horovod had before `op`, or `op` names; Average where neither is given."""
    if average is None and op.__class__ is ReduceOp:
        return op
    if average is not None and op is not None:
        raise InvalidArgumentError(f"{what}: give either `average` or `op`, not both")
    if op is None:
        return Sum if average is False else Average
    try:
        return ReduceOp(op)
    except ValueError:
        names = ", ".join(ReduceOp.__members__)
        raise InvalidArgumentError(f"{what}: expected op to be one of {names}, got {op!r}") from None
