"""Silence: hosts and links that go without a word, stopped processes, and ranks that are merely slow: those are not excluded.

T_dead is 2 s here. Every error must be there within T_dead + 1 s; what is asserted allows more, this machine may be busy.
"""

from __future__ import annotations

import signal
import sys
import time

import pytest
from fault_job import BOUND, DEAD, FaultJob
from netlab import NetLab, why_not

NEEDS_LAB = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
LATEST = DEAD + 3 * BOUND


def check_cut(job: FaultJob, cut_at: float, away: list[int]) -> None:
    """The side of rank 0 has lost the others; the others are fenced."""
    took = {}
    for rank in range(job.size):
        error = job.error_of(rank)
        took[rank] = error["at"] - cut_at
        if rank in away:
            assert error["error"] == "FencedError", f"rank {rank}: {error}"
            assert "lost touch with the job: nothing heard from rank 0 for 2 s" in error["text"], error
        else:
            assert (error["error"], error["ranks"]) == ("PeerLostError", away), f"rank {rank}: {error}"
            assert "nothing heard from rank" in error["text"], error
    print("noticed after", {rank: f"{seconds:.2f} s" for rank, seconds in took.items()})
    assert max(took.values()) < LATEST, took
    assert min(took.values()) > DEAD / 2, took  # only silence tells


def wait_until_heard(job) -> None:
    """Before a rank's first heartbeat the start's timeout applies to it, not ROUNDEL_DEAD_SECONDS."""
    job.wait_running()
    time.sleep(DEAD / 4)  # two beats


@NEEDS_LAB
@pytest.mark.parametrize("host", [0, 1])
def test_a_link_that_goes_down_in_mid_send(tmp_path, host):
    with NetLab(2) as lab, FaultJob(4, "hosts", tmp_path, lab=lab, places=[0, 0, 1, 1], env={"ROUNDEL_HOST_ID": ""}) as job:
        wait_until_heard(job)
        time.sleep(0.2)
        cut = time.time()
        lab.set_link(host, up=False)
        check_cut(job, cut, away=[2, 3])


@NEEDS_LAB
def test_a_link_that_goes_down_while_nobody_sends(tmp_path):
    """Nobody is in an operation; who calls one after T_dead + 1 s learns it at once."""
    with (
        NetLab(2) as lab,
        FaultJob(4, "hosts", tmp_path, "idle", lab=lab, places=[0, 0, 1, 1], env={"ROUNDEL_HOST_ID": ""}) as job,
    ):
        wait_until_heard(job)
        cut = time.time()
        lab.set_link(1, up=False)
        time.sleep(DEAD + BOUND)
        for process in job.processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        check_cut(job, cut, away=[2, 3])


@NEEDS_LAB
def test_a_short_cut_is_no_loss(tmp_path):
    with (
        NetLab(2) as lab,
        FaultJob(2, "tcp", tmp_path, "idle", lab=lab, places=[0, 1], env={"ROUNDEL_DEAD_SECONDS": "4"}) as job,
    ):
        wait_until_heard(job)
        lab.set_link(1, up=False)
        time.sleep(1)
        lab.set_link(1, up=True)
        time.sleep(5)
        killed = time.time()
        job.processes[1].stdin.write("go\n")
        job.processes[1].stdin.flush()
        job.kill(0)
        error = job.error_of(1)
        assert error["error"] == "PeerLostError" and error["ranks"] == [0], error
        assert error["at"] - killed < 3 * BOUND


@pytest.mark.parametrize(("transport", "victim"), [("shm", 2), ("tcp", 1), ("hosts", 3)])
def test_a_stopped_rank_is_excluded_and_finds_word_of_it_when_it_goes_on(transport, victim, tmp_path):
    with FaultJob(4, transport, tmp_path, "mixed", 7) as job:
        wait_until_heard(job)
        time.sleep(0.2)
        stopped = time.time()
        job.processes[victim].send_signal(signal.SIGSTOP)
        for rank in set(range(4)) - {victim}:
            error = job.error_of(rank)
            assert (error["error"], error["ranks"]) == ("PeerLostError", [victim]), error
            assert f"nothing heard from rank {victim} for 2 s: stopped, or cut off" in error["text"]
            assert DEAD / 2 < error["at"] - stopped < LATEST, error
        went_on = time.time()
        job.processes[victim].send_signal(signal.SIGCONT)
        error = job.error_of(victim)
        assert error["error"] in ("FencedError", "PeerLostError"), error  # the others may have ended by then
        assert error["at"] - went_on < 3 * BOUND, error


def test_a_stopped_rank_whose_job_is_still_there_is_fenced_at_once(tmp_path):
    with FaultJob(3, "shm", tmp_path, "idle") as job:
        wait_until_heard(job)
        job.processes[2].send_signal(signal.SIGSTOP)
        time.sleep(DEAD + BOUND)  # nobody is in an operation: all stay
        went_on = time.time()
        job.processes[2].send_signal(signal.SIGCONT)
        job.processes[2].stdin.write("go\n")
        job.processes[2].stdin.flush()
        error = job.error_of(2)
        assert error["error"] == "FencedError" and "excluded from the job" in error["text"], error
        assert error["at"] - went_on < 3 * BOUND, error


def test_when_rank_0_is_stopped_the_others_fence_themselves(tmp_path):
    with FaultJob(3, "tcp", tmp_path) as job:
        wait_until_heard(job)
        stopped = time.time()
        job.processes[0].send_signal(signal.SIGSTOP)
        for rank in (1, 2):
            error = job.error_of(rank)
            assert error["error"] == "FencedError" and DEAD / 2 < error["at"] - stopped < LATEST, error
        job.processes[0].send_signal(signal.SIGCONT)
        assert job.error_of(0)["error"] in ("PeerLostError", "FencedError")


HOLDS_THE_GIL = """
import ctypes, time, numpy as np, roundel
roundel.init()
comm = roundel.communicator()
comm.barrier()
started = time.time()
if comm.rank == 1:
    ctypes.PyDLL(None).usleep(int(5e6))  # PyDLL keeps the GIL
assert comm.allreduce(np.ones(1000))[0] == comm.size
assert time.time() - started > 4.5
print("fine")
"""


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_rank_that_holds_the_gil_is_not_dead(transport, tmp_path, monkeypatch):
    import fault_job

    path = tmp_path / "holds.py"
    path.write_text(HOLDS_THE_GIL)
    monkeypatch.setattr(fault_job, "RANK", str(path))
    with FaultJob(2, transport, tmp_path, env={"ROUNDEL_DEAD_SECONDS": "1", "ROUNDEL_STALL_CHECK_SECONDS": "2"}) as job:
        outputs = [process.communicate(timeout=40)[0] for process in job.processes]
        assert outputs == ["fine\n"] * 2, [job.error_output(rank) for rank in range(2)]
        assert "all-reduce (operation 5) has waited 2 s for rank 1" in job.error_output(0)
        assert "rank 1 is in no operation; its last, barrier" in job.error_output(0)


BUSY = "import time; end = time.time() + 8\nwhile time.time() < end: sum(range(10000))"


@pytest.mark.soak
def test_a_busy_machine_is_no_death(tmp_path):
    import subprocess

    hogs = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(12)]
    try:
        with FaultJob(4, "hosts", tmp_path, "some", env={"ROUNDEL_DEAD_SECONDS": "1"}) as job:
            for rank in range(4):
                assert "left" in job.told(rank)[-1]
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()


def test_a_rank_of_an_earlier_epoch_is_refused(tmp_path):
    """A host that was recreated with the same address and port, or a process that missed a restart."""
    import secrets
    import threading

    from roundel import HandshakeError, TimeoutError, _core
    from team import free_port

    token, address = secrets.token_bytes(32), f"127.0.0.1:{free_port()}"
    said: dict[int, str] = {}

    def open_one(rank: int, epoch: int) -> None:
        try:
            _core.Communicator.open(rank, 2, address, token=token, epoch=epoch, start_timeout=2.0)
        except (HandshakeError, TimeoutError) as error:
            said[rank] = f"{type(error).__name__}: {error}"

    threads = [threading.Thread(target=open_one, args=(rank, epoch)) for rank, epoch in ((0, 2), (1, 1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert said[1].startswith("HandshakeError") and "epoch" in said[1], said
    assert said[0].startswith("TimeoutError") and "rank 1" in said[0], said
