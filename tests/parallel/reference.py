"""What the right answer is, by arithmetic alone."""

from __future__ import annotations

import hashlib

import numpy as np

DTYPES = ["float32", "float64", "float16", "int8", "int16", "int32", "int64", "uint8", "bool"]
COUNTS = [0, 1, 2, 7, 100, 4099, 20_001, 150_001]


def ranks_data(rank: int, count: int, dtype: str, salt: int = 0) -> np.ndarray:
    """Small integers that differ by rank and place: exact in every dtype, also when summed or multiplied over a few ranks."""
    values = (np.arange(count, dtype=np.int64) * 7 + rank * 3 + salt) % 5
    return (values % 2 == 1) if dtype == "bool" else values.astype(dtype)


def over_ranks(op: str, size: int, count: int, dtype: str, salt: int = 0) -> np.ndarray:
    """The reduction of ranks_data over ranks, in integers."""
    rows = np.stack([ranks_data(r, count, dtype, salt).astype(np.int64) for r in range(size)])
    if op == "Average":
        total = rows.sum(0)
        exact = total / size if dtype.startswith("float") else np.trunc(total / size)
    else:
        exact = {"Sum": np.sum, "Min": np.min, "Max": np.max, "Product": np.prod}[op](rows, axis=0)
    return exact.astype(dtype)


def assert_equal_bits(got: np.ndarray, expected: np.ndarray) -> None:
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.dtype == expected.dtype, f"dtype {got.dtype} is not {expected.dtype}"
    assert got.shape == expected.shape, f"shape {got.shape} is not {expected.shape}"
    if got.tobytes() != expected.tobytes():
        wrong = np.flatnonzero(got.reshape(-1) != expected.reshape(-1))
        at = wrong[:5]
        raise AssertionError(
            f"{len(wrong)} wrong of {got.size}: at {at}: {got.reshape(-1)[at]} is not {expected.reshape(-1)[at]}"
        )


def digest(array: np.ndarray) -> np.ndarray:
    """SHA-256 of an array's bytes, as four int64, for comparing ranks."""
    return np.frombuffer(hashlib.sha256(np.ascontiguousarray(array).tobytes()).digest(), dtype=np.int64).copy()


def assert_same_on_all_ranks(comm, array: np.ndarray) -> None:
    everyone = comm.allgather(digest(array)).reshape(comm.size, 4)
    assert (everyone == everyone[0]).all(), f"ranks hold different bits: {everyone}"
