"""Writes the made parts of docs/horovod.md, flags and environment variables, from the tables in the code: `make docs`."""

import sys
from pathlib import Path

from roundel import _core
from roundel.launch.horovodrun import FLAGS, Kind

PAGE = Path(__file__).parent / "horovod.md"

PLACE = "set by roundelrun for scripts that read it"
TUNER = "there are no parameters that are tuned while the job runs"
BUILD = "there is nothing to choose when Roundel is built"
ELASTIC = "a job's number of ranks does not change while it runs yet"

# What Horovod 0.28 reads and no setting of the core stands for: (verdict, why).
OTHERS = {
    "HOROVOD_RANK, HOROVOD_SIZE, HOROVOD_LOCAL_RANK, HOROVOD_LOCAL_SIZE, HOROVOD_CROSS_RANK, HOROVOD_CROSS_SIZE, "
    "HOROVOD_HOSTNAME": ("same", PLACE),
    "HOROVOD_GLOO_RENDEZVOUS_ADDR, HOROVOD_GLOO_RENDEZVOUS_PORT": (
        "refused", "they say that horovodrun started the process: init() ends with how to start it instead"),
    "HOROVOD_CYCLE_TIME": ("no effect", "there is no cycle: tensors travel as soon as all ranks have them"),
    "HOROVOD_CACHE_CAPACITY": ("no effect", "every name is remembered, there is nothing to size"),
    "HOROVOD_HIERARCHICAL_ALLREDUCE, HOROVOD_HIERARCHICAL_ALLGATHER": (
        "no effect", "the cheapest algorithm is chosen for each call; `ROUNDEL_ALGORITHM=hierarchical` forces it"),
    "HOROVOD_AUTOTUNE, HOROVOD_AUTOTUNE_LOG, HOROVOD_AUTOTUNE_WARMUP_SAMPLES, HOROVOD_AUTOTUNE_STEPS_PER_SAMPLE, "
    "HOROVOD_AUTOTUNE_BAYES_OPT_MAX_SAMPLES, HOROVOD_AUTOTUNE_GAUSSIAN_PROCESS_NOISE": ("no effect", TUNER),
    "HOROVOD_CONTROLLER, HOROVOD_CPU_OPERATIONS": (
        "no effect", "there is one controller, Roundel's own; `ROUNDEL_TRANSPORT` chooses between shared memory, TCP and MPI"),
    "HOROVOD_MPI_THREADS_DISABLE": ("no effect", "MPI is initialized for as many threads as it has"),
    "HOROVOD_DYNAMIC_PROCESS_SETS": ("better", "process sets can always be added and removed"),
    "HOROVOD_DISABLE_GROUP_FUSION": ("no effect", "the tensors of a group travel together; so may others with them"),
    "HOROVOD_ADASUM_MPI_CHUNK_SIZE": ("no effect", "Adasum does not depend on the transport"),
    "HOROVOD_THREAD_AFFINITY, HOROVOD_CCL_BGT_AFFINITY": ("no effect", "threads are not bound to cores"),
    "HOROVOD_CCL_CACHE": ("no effect", "oneCCL is not used"),
    "HOROVOD_NUM_NCCL_STREAMS, HOROVOD_BATCH_D2D_MEMCOPIES, HOROVOD_ENABLE_ASYNC_COMPLETION, HOROVOD_DISABLE_NVTX_RANGES": (
        "no effect", "CUDA tensors go through page-locked host memory"),
    "HOROVOD_ENABLE_XLA_OPS": ("no effect", "there is no TensorFlow front"),
    "HOROVOD_LOG_TIMESTAMP, HOROVOD_LOG_HIDE_TIME": (
        "no effect", "log lines have no time; `roundelrun --prefix-output-with-timestamp` has"),
    "HOROVOD_ELASTIC, HOROVOD_ELASTIC_TIMEOUT": ("no effect", ELASTIC),
    "HOROVOD_WITH_PYTORCH, HOROVOD_WITH_TENSORFLOW, HOROVOD_WITH_MXNET, HOROVOD_WITH_MPI, HOROVOD_WITH_GLOO, "
    "HOROVOD_WITHOUT_PYTORCH, HOROVOD_WITHOUT_TENSORFLOW, HOROVOD_WITHOUT_MXNET, HOROVOD_WITHOUT_MPI, HOROVOD_WITHOUT_GLOO, "
    "HOROVOD_GPU, HOROVOD_GPU_OPERATIONS, HOROVOD_GPU_ALLREDUCE, HOROVOD_GPU_ALLGATHER, HOROVOD_GPU_BROADCAST, "
    "HOROVOD_GPU_ALLTOALL, HOROVOD_GPU_REDUCESCATTER, HOROVOD_ALLOW_MIXED_GPU_IMPL, HOROVOD_BUILD_ARCH_FLAGS, "
    "HOROVOD_BUILD_CUDA_CC_LIST, HOROVOD_CUDA_HOME, HOROVOD_NCCL_HOME, HOROVOD_NCCL_LINK, HOROVOD_ROCM_HOME, HOROVOD_CMAKE": (
        "no effect", BUILD),
}  # fmt: skip


def flags() -> str:
    """Every flag of horovodrun's, with its opposites."""
    rows = ["| flag | here | what it does, or why not |", "|---|---|---|"]
    for flag in FLAGS:
        names = ", ".join(f"`{name}`" for name in flag.names + flag.off)
        takes = f" {flag.takes}" if flag.takes else ""
        setting = f" (`{flag.variable}`)" if flag.kind is Kind.SETTING else ""
        rows.append(f"| {names}{takes} | {flag.kind.value.removesuffix(', as a setting')} | {flag.does}{setting} |")
    return "\n".join(rows)


def variables() -> str:
    """Every variable that Horovod reads: those that are settings here, then the rest."""
    rows = ["| variable | here | what it does, or why not |", "|---|---|---|"]
    for name, _, doc, aliases in _core.settings():
        rows += [f"| `{alias}` | same | read as `{name}` where that is not set. {doc} |" for alias in aliases]
    for names, (verdict, why) in OTHERS.items():
        rows.append(f"| {', '.join(f'`{name}`' for name in names.split(', '))} | {verdict} | {why} |")
    return "\n".join(rows)


def filled(page: str) -> str:
    """The page with its made parts as they are now."""
    for name, made in (("flags", flags()), ("variables", variables())):
        before, mark, rest = page.partition(f"<!-- made by make docs: {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if not mark or not end:
            sys.exit(f"{PAGE}: no place for {name}")
        page = before + mark + made + "\n" + end + after
    return page


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
