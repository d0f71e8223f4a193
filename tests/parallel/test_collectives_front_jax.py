"""roundel's functions on JAX's arrays, where JAX is installed."""

from __future__ import annotations

import numpy as np
import pytest
import roundel
from reference import assert_equal_bits, over_ranks, ranks_data

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402

TEAMS = [("shm", 1), ("shm", 3), ("tcp", 2)]


def mine(comm, dtype: str = "float32") -> jax.Array:
    return jnp.asarray(ranks_data(comm.rank, 12, "float32").reshape(4, 3)).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_results_are_jaxs_and_inputs_stay(comm, dtype):
    x, expected = mine(comm, dtype), over_ranks("Sum", comm.size, 12, "float32").reshape(4, 3)
    for view in (x, x.T, x[::2]):
        got = roundel.allreduce(view, roundel.Sum)
        assert isinstance(got, jax.Array) and got.dtype == x.dtype and got.sharding == view.sharding
        right = {x.shape: expected, x.T.shape: expected.T, (2, 3): expected[::2]}[view.shape]
        assert_equal_bits(np.asarray(got).astype("float32"), np.ascontiguousarray(right))
    assert_equal_bits(np.asarray(x), np.asarray(mine(comm, dtype)))
    scalar = roundel.allreduce(jnp.float32(2.0), roundel.Sum)
    assert isinstance(scalar, jax.Array) and scalar.shape == () and scalar == 2 * comm.size


def test_every_operation(comm):
    x = mine(comm)
    for got in roundel.grouped_allreduce([x, x + 1], roundel.Max):
        assert isinstance(got, jax.Array)
    assert roundel.allgather(x).shape == (4 * comm.size, 3)
    assert_equal_bits(np.asarray(roundel.broadcast(x, comm.size - 1)), ranks_data(comm.size - 1, 12, "float32").reshape(4, 3))
    assert sum(roundel.allgather(jnp.array([roundel.reducescatter(x).shape[0]])).tolist()) == 4
    assert roundel.alltoall(jnp.ones(comm.size)).tolist() == [1.0] * comm.size
    tree = jax.tree.map(lambda leaf: roundel.allreduce(leaf), {"w": x, "b": [x[0]]})
    assert isinstance(tree["b"][0], jax.Array)


def test_what_cannot_be_is_refused(comm):
    x = mine(comm)
    for call in (lambda: roundel.allreduce_(x), lambda: roundel.broadcast_(x, 0), lambda: roundel.grouped_allreduce_([x])):
        with pytest.raises(roundel.InvalidArgumentError, match=r"JAX's arrays cannot be changed in place: use \w+[a-z]\(\)"):
            call()
    with pytest.raises(roundel.InvalidArgumentError, match="being traced"):
        jax.jit(roundel.allreduce)(x)
