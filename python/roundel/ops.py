"""Reduction operators, under Horovod's names."""

from __future__ import annotations

import enum

__all__ = ["Average", "Max", "Min", "Product", "ReduceOp", "Sum"]


class ReduceOp(enum.IntEnum):
    """How values of different ranks become one. The numbers are those of csrc/base/dtype.h."""

    Sum = 0
    Average = 1
    Min = 2
    Max = 3
    Product = 4


Sum = ReduceOp.Sum
Average = ReduceOp.Average
Min = ReduceOp.Min
Max = ReduceOp.Max
Product = ReduceOp.Product
