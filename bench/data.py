"""What is sent, and how a result is checked.

Every rank's data repeat a table of PERIOD small integers, so that what must come out is a short table too. The numbers stay
within what the dtype holds exactly, also when a reduction in place is repeated: results are compared for equality.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from roundel.ops import ReduceOp

PERIOD = 251  # prime: a block that is displaced by a power of two does not look right
POISON = 0xFF  # every byte of an output before the call: NaN, -1 or 255, none of which is ever expected
UNLIMITED = 1 << 30

OPS = {"sum": ReduceOp.Sum, "prod": ReduceOp.Product, "min": ReduceOp.Min, "max": ReduceOp.Max, "avg": ReduceOp.Average}
FOLD = {"sum": np.sum, "prod": np.prod, "min": np.min, "max": np.max, "avg": np.mean}


@dataclass(frozen=True)
class DType:
    """storage: how numpy holds an element. exact: 0 to this are values, and none is POISON. eps: of rounding, 0 for int."""

    name: str
    storage: np.dtype
    exact: int
    eps: float

    def encode(self, values: np.ndarray) -> np.ndarray:
        if self.name == "bfloat16":  # numpy has none: the upper half of a float32
            return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        return values.astype(self.storage)

    def decode(self, stored: np.ndarray) -> np.ndarray:
        if self.name == "bfloat16":
            return (stored.astype(np.uint32) << 16).view(np.float32)
        return stored

    def argument(self, stored: np.ndarray):
        """What the library is called with."""
        if self.name == "bfloat16":
            import torch

            return torch.from_numpy(stored.view(np.int16)).view(torch.bfloat16)
        return stored


def _floating(name: str, mantissa: int) -> DType:
    storage = np.dtype("uint16" if name == "bfloat16" else name)
    return DType(name, storage, 1 << mantissa, 2.0 ** (1 - mantissa))


DTYPES = {n: _floating(n, mantissa) for n, mantissa in (("float32", 24), ("float64", 53), ("float16", 11), ("bfloat16", 8))}
DTYPES |= {n: DType(n, np.dtype(n), int(np.iinfo(n).max) - 1, 0.0) for n in ("int8", "int16", "int32", "int64", "uint8")}


class Numbers:
    """The tables of all ranks for one dtype, operator and number of ranks, as integers."""

    def __init__(self, dtype: DType, op: str, size: int) -> None:
        self.dtype, self.op, self.size = dtype, op, size
        unit = size if op == "avg" else 1  # averages come out whole
        high = max(1, min(3, dtype.exact // (size * unit)))
        if op == "prod":  # one factor of 2 at most
            place = np.arange(PERIOD) % (size + 1)
            self.tables = [np.where(place == rank, 2, 1) for rank in range(size)]
        else:
            self.tables = [unit * np.random.default_rng(rank).integers(0, high + 1, PERIOD) for rank in range(size)]
        self.first = FOLD[op](self.tables, axis=0).astype(np.int64)
        # 1/size is not a float for sizes such as 3: averages of equal numbers may then be off by a rounding per call
        self.rounds = op == "avg" and dtype.eps > 0 and size & (size - 1) != 0
        self.most_calls = self._most_calls()

    def reduced(self, calls: int) -> np.ndarray:
        """The result of the `calls`-th reduction in place: from the second one on, all ranks bring the same numbers."""
        if self.op == "sum":
            return self.first * self.size ** (calls - 1)
        if self.op == "prod":
            return self.first ** (self.size ** (calls - 1))
        return self.first

    def _most_calls(self) -> int:
        """How many reductions in place keep the numbers exact."""
        if self.size == 1 or self.op in ("min", "max", "avg"):
            return 16 if self.rounds else UNLIMITED
        calls, value = 1, int(self.first.max())
        grow = (lambda v: v * self.size) if self.op == "sum" else (lambda v: v**self.size)
        while (value := grow(value)) <= self.dtype.exact:
            calls += 1
        return calls

    def tolerance(self, calls: int) -> float:
        return (calls + 1) * self.dtype.eps if self.rounds else 0.0


def periodic(table: np.ndarray, count: int) -> np.ndarray:
    """`count` elements: the table again and again."""
    return np.resize(table, count)


def first_bad(stored: np.ndarray, table: np.ndarray, start: int, dtype: DType, tolerance: float = 0.0) -> int | None:
    """Index of the first element that is not table[(start + index) % PERIOD]."""
    table = dtype.decode(dtype.encode(np.roll(table, -start)))
    whole = len(stored) // PERIOD * PERIOD
    for begin, part in ((0, stored[:whole].reshape(-1, PERIOD)), (whole, stored[None, whole:])):
        expected = table[: part.shape[1]]
        bad = part != dtype.encode(expected) if tolerance == 0 else _far(dtype.decode(part), expected, tolerance)
        if bad.any():
            return begin + int(bad.argmax())
    return None


def _far(values: np.ndarray, expected: np.ndarray, tolerance: float) -> np.ndarray:
    return ~(np.abs(values - expected) <= tolerance * np.abs(expected))  # so that NaN is far
