"""Arrays of any library go in without a copy and come back as the same library's; what cannot go in is refused, and why."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import roundel
from roundel import InvalidArgumentError, PeerLostError, RoundelError, _core


@pytest.fixture(scope="module")
def alone():
    return _core.Communicator.open(0, 1)


class Foreign:
    """An array of a library that speaks DLPack only."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **kwargs):
        return self.array.__dlpack__(**kwargs)


def test_numpy_in_numpy_out(alone):
    x = np.arange(6.0).reshape(2, 3)
    y = alone.allreduce(x)
    assert type(y) is np.ndarray and y.shape == x.shape and (y == x).all() and not np.shares_memory(x, y)


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (2, 3, 4)])
def test_every_shape(alone, shape):
    x = np.ones(shape, dtype=np.int16)
    assert alone.allreduce(x).shape == shape
    assert alone.broadcast(x, 0).shape == shape
    assert alone.allgather(x).shape == (shape or (1,))


def test_in_place_is_the_callers_memory(alone):
    x = np.ones(5)
    assert alone.allreduce(x, 0, x, prescale=3.0) is x
    assert (x == 3).all()


def test_any_library_with_dlpack(alone):
    source = np.arange(5, dtype=np.float32)
    y = alone.allreduce(Foreign(source), prescale=2.0)
    assert isinstance(y, np.ndarray) and (y == 2 * source).all()
    alone.allreduce(Foreign(source), 0, Foreign(source), prescale=2.0)
    assert (source == 2 * np.arange(5)).all()


def test_torch_in_torch_out(alone):
    torch = pytest.importorskip("torch")
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.uint8):
        x = torch.ones(3, 2, dtype=dtype)
        y = alone.allreduce(x)
        assert isinstance(y, torch.Tensor) and y.dtype == dtype and torch.equal(x, y)
    parameter = torch.nn.Parameter(torch.ones(4))
    assert torch.equal(alone.allreduce(parameter.detach()), torch.ones(4))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: np.ones((3, 4)).T, "C-contiguous"),
        (lambda: np.ones(3, dtype=complex), "complex128"),
        (lambda: np.ones(3, dtype=">f4"), ">f4"),
        (lambda: np.array(["a"]), "float32, float64"),
        (lambda: [1.0, 2.0], "list"),
        (lambda: None, "NoneType"),
    ],
)
def test_what_cannot_go_in_is_refused(alone, make, text):
    with pytest.raises(InvalidArgumentError, match=text):
        alone.allreduce(make())
    with pytest.raises(ValueError):
        alone.allreduce(make())


def test_torch_tensors_that_cannot_go_in_are_refused(alone):
    torch = pytest.importorskip("torch")
    with pytest.raises(InvalidArgumentError, match="contiguous"):
        alone.allreduce(torch.ones(3, 4).T)
    with pytest.raises(InvalidArgumentError, match="DLPack type code"):
        alone.allreduce(torch.ones(3, dtype=torch.complex64))


def test_library_allocated_memory_outlives_its_communicator():
    comm = _core.Communicator.open(0, 1)
    blocks = [comm.allocate(n) for n in (0, 1, 63, 4096, 1 << 20)]
    for block in blocks:
        assert block.ctypes.data % 64 == 0 and (block == 0).all()
        block[:] = 7
    comm.shutdown()
    del comm
    assert all((block == 7).all() for block in blocks)
    del block, blocks[2], blocks[0]
    assert (blocks[-1] == 7).all()


def test_freed_memory_is_used_again_and_zero():
    comm = _core.Communicator.open(0, 1)
    first = comm.allocate(1 << 20)
    address, first[:] = first.ctypes.data, 9
    del first
    again = comm.allocate(1 << 20)
    assert again.ctypes.data == address and (again == 0).all()


def test_memory_that_does_not_fit_is_an_error(alone):
    with pytest.raises(RoundelError, match="ROUNDEL_ARENA_BYTES"):
        alone.allocate(1 << 46)


def test_calls_before_init_and_after_shutdown_say_so():
    if roundel.is_initialized():
        roundel.shutdown()
    with pytest.raises(RoundelError, match="init"):
        roundel.rank()
    comm = _core.Communicator.open(0, 1)
    comm.shutdown()
    with pytest.raises(RoundelError, match="shut down"):
        comm.allreduce(np.ones(3))


def test_errors_can_be_pickled():
    error = PeerLostError("rank 0: rank 3 died", (3,), 2, "all-reduce")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.ranks, copy.epoch, copy.op) == (str(error), (3,), 2, "all-reduce")


def test_verbs_take_what_people_have():
    roundel.init()
    try:
        assert roundel.allreduce([1, 2]).tolist() == [1, 2]
        assert roundel.allreduce(3.5) == 3.5
        assert roundel.allgather(7).tolist() == [7]
        assert roundel.allreduce(np.ones((2, 3)).T).shape == (3, 2)
        x = np.ones(2)
        assert roundel.broadcast(x) is not x
        assert roundel.reduce_scatter(np.arange(3.0)).tolist() == [0, 1, 2]
        assert roundel.alltoall(np.arange(3.0)).tolist() == [0, 1, 2]
        roundel.barrier()
    finally:
        roundel.shutdown()
