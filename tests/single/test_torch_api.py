"""Horovod's names, arguments and defaults, and what a job of one answers."""

from __future__ import annotations

import importlib
import inspect
import pickle

import pytest
import roundel
import roundel.torch as hvd
import torch

ALL = hvd.global_process_set
SCALES = {"prescale_factor": 1.0, "postscale_factor": 1.0}
REDUCE = {"average": None, "name": None, "op": None, **SCALES, "process_set": ALL}
COMPRESSED = {"average": None, "name": None, "compression": hvd.Compression.none, "op": None, **SCALES, "process_set": ALL}
NAMED = {"name": None, "process_set": ALL}
SCATTER = {"name": None, "op": hvd.Average, "process_set": ALL, **SCALES}
COMPRESSED_SCATTER = {"name": None, "compression": hvd.Compression.none, "op": hvd.Average, "process_set": ALL, **SCALES}
REQUIRED = inspect.Parameter.empty

# Arguments in Horovod 0.28's order, with its defaults. Ours may have defaults where Horovod has none, and more at the end.
SIGNATURES = {
    "allreduce": {"tensor": REQUIRED, **COMPRESSED},
    "allreduce_": {"tensor": REQUIRED, **REDUCE},
    "allreduce_async": {"tensor": REQUIRED, **REDUCE},
    "allreduce_async_": {"tensor": REQUIRED, **REDUCE},
    "grouped_allreduce": {"tensors": REQUIRED, **COMPRESSED},
    "grouped_allreduce_": {"tensors": REQUIRED, **REDUCE},
    "grouped_allreduce_async": {"tensors": REQUIRED, **REDUCE},
    "grouped_allreduce_async_": {"tensors": REQUIRED, **REDUCE},
    "sparse_allreduce_async": {"tensor": REQUIRED, "name": REQUIRED, "op": REQUIRED, "process_set": ALL},
    "allgather": {"tensor": REQUIRED, **NAMED},
    "allgather_async": {"tensor": REQUIRED, **NAMED},
    "grouped_allgather": {"tensors": REQUIRED, **NAMED},
    "grouped_allgather_async": {"tensors": REQUIRED, **NAMED},
    "broadcast": {"tensor": REQUIRED, "root_rank": REQUIRED, **NAMED},
    "broadcast_": {"tensor": REQUIRED, "root_rank": REQUIRED, **NAMED},
    "broadcast_async": {"tensor": REQUIRED, "root_rank": REQUIRED, **NAMED},
    "broadcast_async_": {"tensor": REQUIRED, "root_rank": REQUIRED, **NAMED},
    "alltoall": {"tensor": REQUIRED, "splits": None, **NAMED},
    "alltoall_async": {"tensor": REQUIRED, "splits": None, **NAMED},
    "reducescatter": {"tensor": REQUIRED, **COMPRESSED_SCATTER},
    "reducescatter_async": {"tensor": REQUIRED, **SCATTER},
    "grouped_reducescatter": {"tensors": REQUIRED, **COMPRESSED_SCATTER},
    "grouped_reducescatter_async": {"tensors": REQUIRED, **SCATTER},
    "barrier": {"process_set": ALL},
    "join": {"device": -1},
    "poll": {"handle": REQUIRED},
    "synchronize": {"handle": REQUIRED},
    "init": {"comm": None, "process_sets": None},
    "start_timeline": {"file_path": REQUIRED, "mark_cycles": False},
    "add_process_set": {"process_set": REQUIRED},
    "remove_process_set": {"process_set": REQUIRED},
    "broadcast_parameters": {"params": REQUIRED, "root_rank": REQUIRED},
    "broadcast_optimizer_state": {"optimizer": REQUIRED, "root_rank": REQUIRED, "model": None},
    "broadcast_object": {"obj": REQUIRED, "root_rank": 0, **NAMED},
    "allgather_object": {"obj": REQUIRED, **NAMED},
    "DistributedOptimizer": {
        "optimizer": REQUIRED,
        "named_parameters": None,
        "compression": hvd.Compression.none,
        "backward_passes_per_step": 1,
        "op": hvd.Average,
        "gradient_predivide_factor": 1.0,
        "num_groups": 0,
        "groups": None,
        "sparse_as_dense": False,
        "process_set": ALL,
    },
    "SyncBatchNorm": {
        "num_features": REQUIRED,
        "eps": 1e-5,
        "momentum": 0.1,
        "affine": True,
        "track_running_stats": True,
    },
}
NO_ARGUMENTS = """
shutdown is_initialized stop_timeline size rank local_size local_rank cross_size cross_rank is_homogeneous
mpi_enabled mpi_built mpi_threads_supported gloo_enabled gloo_built nccl_built cuda_built rocm_built ddl_built ccl_built
"""


@pytest.mark.parametrize("name", [*SIGNATURES, *NO_ARGUMENTS.split()])
def test_arguments_are_horovods(name):
    ours = inspect.signature(getattr(hvd, name)).parameters
    expected = SIGNATURES.get(name, {})
    assert list(ours)[: len(expected)] == list(expected)
    for argument, default in expected.items():
        if default is not REQUIRED:
            assert ours[argument].default is default or ours[argument].default == default, argument
    assert all(p.default is not REQUIRED for p in list(ours.values())[len(expected) :])
    assert getattr(hvd, name).__doc__
    assert name in hvd.__all__


def test_the_other_names_are_there():
    for name in (
        "Average",
        "Sum",
        "Adasum",
        "Min",
        "Max",
        "Product",
        "Compression",
        "ProcessSet",
        "global_process_set",
        "elastic",
    ):
        assert hasattr(hvd, name) and name in hvd.__all__
    for name in ("TorchState", "ElasticSampler", "State", "ObjectState", "run"):
        assert hasattr(hvd.elastic, name)
    assert all(hasattr(hvd, name) for name in hvd.__all__)


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("roundel.torch.mpi_ops", "allreduce_async poll synchronize init size Adasum alltoall"),
        ("roundel.torch.compression", "Compression"),
        ("roundel.torch.functions", "broadcast_parameters broadcast_object allgather_object"),
        ("roundel.torch.optimizer", "DistributedOptimizer"),
        ("roundel.torch.sync_batch_norm", "SyncBatchNorm"),
        ("roundel.torch.elastic", "TorchState ElasticSampler run"),
        ("roundel.torch.elastic.state", "TorchState get_handler_registry set_handler_registry"),
        ("roundel.torch.elastic.sampler", "ElasticSampler"),
        ("roundel.common.exceptions", "HorovodInternalError HostsUpdatedInterrupt"),
        ("roundel.common.process_sets", "ProcessSet add_process_set process_set_by_id"),
        ("roundel.common.elastic", "State ObjectState run_fn"),
    ],
)
def test_modules_have_horovods_names(module, names):
    assert all(hasattr(importlib.import_module(module), name) for name in names.split())


def test_what_scripts_catch():
    for error in (roundel.PeerLostError, roundel.MismatchError, roundel.TimeoutError, roundel.CorruptFrameError):
        assert issubclass(error, roundel.HorovodInternalError) and issubclass(error, RuntimeError)
    for error in (roundel.InvalidArgumentError, roundel.DuplicateNameError):
        assert issubclass(error, ValueError) and not issubclass(error, roundel.HorovodInternalError)
    assert not issubclass(roundel.HostsUpdatedInterrupt, roundel.HorovodInternalError)
    interrupt = pickle.loads(pickle.dumps(roundel.HostsUpdatedInterrupt(True)))
    assert interrupt.skip_sync is True


def test_before_init_everything_says_so():
    assert not hvd.is_initialized()
    x, p = torch.ones(2), torch.nn.Parameter(torch.ones(2))
    sparse = torch.eye(2).to_sparse()
    calls = [
        *(getattr(hvd, name) for name in ("size", "rank", "local_rank", "cross_size", "join", "barrier", "is_homogeneous")),
        *(lambda name=name: getattr(hvd, name)(x) for name in ("allreduce", "allgather_async", "alltoall", "reducescatter")),
        *(lambda name=name: getattr(hvd, name)([x]) for name in ("grouped_allreduce_", "grouped_allgather")),
        lambda: hvd.broadcast(x, 0),
        lambda: hvd.sparse_allreduce_async(sparse, "s", hvd.Sum),
        lambda: hvd.add_process_set([0]),
        lambda: hvd.broadcast_object(1),
        lambda: hvd.allgather_object(1),
        lambda: hvd.broadcast_parameters({"x": x}),
        lambda: hvd.DistributedOptimizer(torch.optim.SGD([p], lr=0.1)),
        lambda: hvd.start_timeline("unused"),
        hvd.stop_timeline,
    ]
    for call in calls:
        with pytest.raises(roundel.RoundelError, match="call init"):
            call()
    assert (hvd.global_process_set.size(), hvd.global_process_set.ranks, hvd.ProcessSet([0]).process_set_id) == (None, [], None)


@pytest.fixture
def job_of_one():
    hvd.init()
    yield
    hvd.shutdown()


def test_what_is_built_and_enabled(job_of_one):
    answers = [hvd.mpi_enabled(), hvd.rocm_built(), hvd.ddl_built(), hvd.ccl_built()]
    assert not any(answers)
    assert hvd.mpi_built() is True
    assert hvd.gloo_built() is hvd.gloo_enabled() is hvd.is_homogeneous() is True
    assert hvd.nccl_built() == 0
    assert isinstance(hvd.cuda_built(), bool)
    with pytest.raises(ValueError, match="MPI"):
        hvd.mpi_threads_supported()


def test_init_refuses_before_it_joins_the_job():
    for wrong in ({"comm": [1]}, {"comm": "all"}, {"process_sets": "static"}, {"process_sets": [[0]]}, {"comm": [0, 1]}):
        with pytest.raises(ValueError, match="init: expected|process_sets: expected"):
            hvd.init(**wrong)
        assert not hvd.is_initialized()


def test_init_takes_a_communicator_of_the_same_ranks():
    class Comm:
        """As mpi4py's."""

        def __init__(self, rank: int, size: int) -> None:
            self.place = rank, size

        def Get_rank(self) -> int:
            return self.place[0]

        def Get_size(self) -> int:
            return self.place[1]

    with pytest.raises(ValueError, match="init: expected"):
        hvd.init(Comm(0, 2))
    assert not hvd.is_initialized()
    hvd.init(Comm(0, 1))
    assert hvd.is_initialized()
    hvd.shutdown()
    with pytest.raises(ValueError, match="MPI communicator"):
        hvd.ProcessSet(Comm(0, 1))


def test_sets_do_not_outlive_their_job():
    hvd.init()
    some = hvd.ProcessSet([0])
    with pytest.raises(ValueError, match="duplicate"):
        hvd.add_process_set(some)  # all ranks there are
    hvd.shutdown()
    assert hvd.ProcessSet([1, 0]).ranks == [0, 1]
    for wrong in (3, "01", [0.5], [True], []):
        with pytest.raises(ValueError, match="ProcessSet: expected"):
            hvd.ProcessSet(wrong)


def test_handles_remember_their_result(job_of_one):
    handle = hvd.allreduce_async(torch.ones(3))
    assert hvd.synchronize(handle) is hvd.synchronize(handle)
