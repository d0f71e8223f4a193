"""Adasum through the engine, against the formula in float64 on the tree that csrc/engine/adasum.h describes."""

from __future__ import annotations

import numpy as np
import pytest
from reference import assert_same_on_all_ranks
from roundel.errors import InvalidArgumentError
from roundel.world import engine

TEAMS = [("shm", 1), *((transport, size) for transport in ("shm", "tcp") for size in (2, 3, 4)), ("hosts", 4)]
ADASUM = 5
TOLERANCE = {"float16": 1e-3, "float32": 1e-6, "float64": 1e-12}


def combine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    aa, ab, bb = (np.vdot(x, y) for x, y in ((a, a), (a, b), (b, b)))
    return (1 - ab / (2 * aa) if aa else 1) * a + (1 - ab / (2 * bb) if bb else 1) * b


def adasum(arrays: list[np.ndarray]) -> np.ndarray:
    """The last ranks beyond a power of two go into those before them; then neighbours, and neighbours of those."""
    arrays = [a.astype(np.float64) for a in arrays]
    power = 1 << (len(arrays).bit_length() - 1)
    extra = len(arrays) - power
    for r in range(power - extra, power):
        arrays[r] = combine(arrays[r], arrays[r + extra])
    arrays = arrays[:power]
    while len(arrays) > 1:
        arrays = [combine(a, b) for a, b in zip(arrays[::2], arrays[1::2], strict=True)]
    return arrays[0]


def gradient(rank: int, shape, dtype, salt: int = 0) -> np.ndarray:
    """What a rank contributes: related to the others', as gradients are."""
    common, own = np.random.default_rng(salt), np.random.default_rng([salt, rank])
    return np.asarray(common.standard_normal(shape) + (rank + 1) * own.standard_normal(shape), dtype)


def assert_close(got: np.ndarray, expected: np.ndarray) -> None:
    largest = np.abs(expected).max(initial=1e-30)
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE[got.dtype.name] * largest)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("count", [1, 7, 1000, 60_001, 120_000])
def test_it_is_the_formula(comm, dtype, count):
    x = gradient(comm.rank, count, dtype)
    before = x.copy()
    (result,) = engine().allreduce([x], op=ADASUM, name="grad").wait()
    assert result.dtype == x.dtype
    assert_close(result, adasum([gradient(r, count, dtype) for r in range(comm.size)]))
    assert_same_on_all_ranks(comm, result)
    assert (x == before).all()


def test_tensors_of_a_group_have_coefficients_of_their_own(comm):
    shapes, dtypes = [(3, 4), (), (0,), (50_000,), (17,)], ["float32", "float64", "float32", "float16", "float64"]
    xs = [gradient(comm.rank, s, d, i) for i, (s, d) in enumerate(zip(shapes, dtypes, strict=True))]
    results = engine().allreduce(xs, op=ADASUM, name="group").wait()
    for i, (s, d, result) in enumerate(zip(shapes, dtypes, results, strict=True)):
        assert result.shape == s
        assert_close(result, adasum([gradient(r, s, d, i) for r in range(comm.size)]))


def test_it_is_scaled_and_works_in_place(comm):
    x = gradient(comm.rank, 5000, "float32")
    (y,) = engine().allreduce([x], [x], op=ADASUM, prescale=0.5, postscale=3.0, name="scaled").wait()
    assert y is x
    assert_close(x, 1.5 * adasum([gradient(r, 5000, "float32") for r in range(comm.size)]))


def test_orthogonal_gradients_are_added_and_equal_ones_averaged(comm):
    apart = np.zeros(comm.size)
    apart[comm.rank] = comm.rank + 1
    equal, nothing = np.full(9, 2.5, np.float32), np.zeros(4, np.float32)
    results = engine().allreduce([apart, equal, nothing], op=ADASUM, name="simple").wait()
    np.testing.assert_array_equal(results[0], np.arange(comm.size) + 1)
    np.testing.assert_array_equal(results[1], equal)
    np.testing.assert_array_equal(results[2], nothing)


def test_many_at_once_in_any_order_beside_sums(comm):
    rng = np.random.default_rng(comm.rank)
    handles = {}
    for i in rng.permutation(30):
        x = gradient(comm.rank, 100 * i, "float32", int(i))
        handles[i] = engine().allreduce([x], op=ADASUM if i % 2 else 0, name=f"t{i}")
    for i, handle in handles.items():
        inputs = [gradient(r, 100 * i, "float32", int(i)) for r in range(comm.size)]
        assert_close(handle.wait()[0], adasum(inputs) if i % 2 else np.sum([x.astype(np.float64) for x in inputs], 0))


def test_in_a_process_set(comm):
    if comm.size == 1:
        return
    members = list(range(comm.size - 1))
    number = engine().add_process_set(members).wait()
    if comm.rank in members:
        (result,) = (
            engine().allreduce([gradient(comm.rank, 2000, "float64")], op=ADASUM, process_set=number, name="some").wait()
        )
        assert_close(result, adasum([gradient(r, 2000, "float64") for r in members]))
    engine().remove_process_set(number).wait()


def test_a_rank_that_has_joined_counts_as_zero(comm):
    if comm.rank == comm.size - 1:
        assert engine().join().wait() >= 0
        return
    (result,) = engine().allreduce([gradient(comm.rank, 2000, "float64")], op=ADASUM, name="left").wait()
    zero = np.zeros(2000)
    assert_close(result, adasum([gradient(r, 2000, "float64") for r in range(comm.size - 1)] + [zero]))
    engine().join().wait()


def test_integers_are_refused_and_the_job_goes_on(comm):
    with pytest.raises(InvalidArgumentError, match="floating"):
        engine().allreduce([np.arange(4)], op=ADASUM, name="integers")
    (result,) = engine().allreduce([np.ones(3, np.float32)], op=ADASUM, name="after").wait()
    np.testing.assert_array_equal(result, np.ones(3))
