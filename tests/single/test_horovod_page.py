"""docs/horovod.md says what is: every function under Horovod's signature, every flag and variable as the code has it."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "horovod.md").read_text()
ROW = re.compile(r"\| `(?P<call>[\w.]+\(.*?\))` \| (?P<verdict>[\w ]+) \|")
VERDICTS = {"same", "better", "no effect", "refused"}

# `from horovod.torch import ...` of 0.28.1, as its documentation lists it, and what is under `horovod.torch.elastic`.
NAMES = """
    init shutdown is_initialized start_timeline stop_timeline size local_size cross_size rank local_rank cross_rank
    is_homogeneous mpi_threads_supported mpi_enabled mpi_built gloo_enabled gloo_built nccl_built ddl_built ccl_built
    cuda_built rocm_built allreduce allreduce_async allreduce_ allreduce_async_ grouped_allreduce grouped_allreduce_async
    grouped_allreduce_ grouped_allreduce_async_ sparse_allreduce_async allgather allgather_async grouped_allgather
    grouped_allgather_async broadcast broadcast_async broadcast_ broadcast_async_ alltoall alltoall_async reducescatter
    reducescatter_async grouped_reducescatter grouped_reducescatter_async join barrier poll synchronize ProcessSet
    add_process_set remove_process_set DistributedOptimizer SyncBatchNorm broadcast_parameters broadcast_optimizer_state
    broadcast_object broadcast_object_fn allgather_object elastic.run elastic.State elastic.ObjectState elastic.TorchState
    elastic.ElasticSampler
"""
VALUES = "Average Sum Adasum Min Max Product Compression.none Compression.fp16 Compression.bf16 global_process_set"


def rows() -> list[tuple[str, ast.Call, str]]:
    found = []
    for match in ROW.finditer(PAGE):
        call = ast.parse(match["call"], mode="eval").body
        if "horovod" not in match["call"]:
            found.append((ast.unparse(call.func), call, match["verdict"]))
    return found


def attribute(hvd, path: str):
    for name in path.split("."):
        hvd = getattr(hvd, name)
    return hvd


def test_the_table_has_every_function_once():
    names = [name for name, _, _ in rows()]
    assert sorted(names) == sorted(NAMES.split())
    assert {verdict for _, _, verdict in rows()} <= VERDICTS


@pytest.mark.parametrize(("name", "call"), [pytest.param(n, c, id=n) for n, c, v in rows() if v in ("same", "better")])
def test_signatures_are_horovods(name, call):
    """Its arguments come first, under its names, in its order and with its defaults; further ones of ours come after."""
    hvd = pytest.importorskip("roundel.torch")
    ours = list(inspect.signature(attribute(hvd, name)).parameters.values())
    theirs = [(argument.id, inspect.Parameter.empty) for argument in call.args]
    theirs += [(word.arg, eval(ast.unparse(word.value), dict(vars(hvd)))) for word in call.keywords]
    for (wanted, default), got in zip(theirs, ours, strict=False):
        assert got.name == wanted
        if default is not inspect.Parameter.empty:
            assert got.default is default or got.default == default, wanted
    assert len(ours) >= len(theirs)
    for extra in ours[len(theirs) :]:
        assert extra.default is not inspect.Parameter.empty or extra.kind is inspect.Parameter.VAR_KEYWORD, extra


def test_values_are_there():
    hvd = pytest.importorskip("roundel.torch")
    assert (
        re.findall(r"`([\w.]+)`", "".join(re.findall(r"^\| `(?:Average|Compression|global)[^|]*", PAGE, re.M)))
        == VALUES.split()
    )
    for value in VALUES.split():
        attribute(hvd, value)
    from roundel.common.exceptions import HorovodInternalError, HostsUpdatedInterrupt

    assert issubclass(HorovodInternalError, RuntimeError) and issubclass(HostsUpdatedInterrupt, RuntimeError)


def test_flags_and_variables_are_made_from_the_code():
    spec = importlib.util.spec_from_file_location("make_horovod", ROOT / "docs" / "make_horovod.py")
    make_horovod = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_horovod)
    assert make_horovod.filled(PAGE) == PAGE, "run `make docs`"
    assert {verdict for verdict, _ in make_horovod.OTHERS.values()} <= VERDICTS


# What Horovod 0.28.1 reads while a job runs.
VARIABLES = """
    HOROVOD_MPI_THREADS_DISABLE HOROVOD_TIMELINE HOROVOD_TIMELINE_MARK_CYCLES HOROVOD_AUTOTUNE HOROVOD_AUTOTUNE_LOG
    HOROVOD_AUTOTUNE_WARMUP_SAMPLES HOROVOD_AUTOTUNE_STEPS_PER_SAMPLE HOROVOD_AUTOTUNE_BAYES_OPT_MAX_SAMPLES
    HOROVOD_AUTOTUNE_GAUSSIAN_PROCESS_NOISE HOROVOD_FUSION_THRESHOLD HOROVOD_CYCLE_TIME HOROVOD_STALL_CHECK_DISABLE
    HOROVOD_STALL_CHECK_TIME_SECONDS HOROVOD_STALL_SHUTDOWN_TIME_SECONDS HOROVOD_HIERARCHICAL_ALLREDUCE
    HOROVOD_HIERARCHICAL_ALLGATHER HOROVOD_CACHE_CAPACITY HOROVOD_BATCH_D2D_MEMCOPIES HOROVOD_NUM_NCCL_STREAMS
    HOROVOD_CPU_OPERATIONS HOROVOD_CONTROLLER HOROVOD_CCL_CACHE HOROVOD_GLOO_IFACE HOROVOD_ADASUM_MPI_CHUNK_SIZE
    HOROVOD_THREAD_AFFINITY HOROVOD_DISABLE_GROUP_FUSION HOROVOD_DISABLE_NVTX_RANGES HOROVOD_ENABLE_ASYNC_COMPLETION
    HOROVOD_DYNAMIC_PROCESS_SETS HOROVOD_ENABLE_XLA_OPS HOROVOD_LOG_LEVEL HOROVOD_LOG_TIMESTAMP HOROVOD_LOG_HIDE_TIME
    HOROVOD_GLOO_TIMEOUT_SECONDS HOROVOD_GLOO_RENDEZVOUS_ADDR HOROVOD_GLOO_RENDEZVOUS_PORT HOROVOD_START_TIMEOUT
    HOROVOD_ELASTIC HOROVOD_ELASTIC_TIMEOUT HOROVOD_RANK HOROVOD_SIZE HOROVOD_LOCAL_RANK HOROVOD_LOCAL_SIZE
    HOROVOD_CROSS_RANK HOROVOD_CROSS_SIZE HOROVOD_HOSTNAME
"""


def test_every_variable_has_a_row():
    table = PAGE.partition("## Environment variables")[2]
    listed = re.findall(r"`(HOROVOD_\w+)`", table)
    assert set(VARIABLES.split()) <= set(listed)
    assert len(listed) == len(set(listed))


def test_the_stated_examples_exist():
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / path).exists(), path
    for path in re.findall(r"`(tests/[\w/.]+)`", PAGE):
        assert (ROOT / path).exists(), path
