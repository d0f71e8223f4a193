"""Reduction operators, under Horovod's names."""

from __future__ import annotations

import enum

__all__ = ["Adasum", "Average", "Max", "Min", "Product", "ReduceOp", "Sum"]


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
