"""What happens to ranks at every phase of the protocol, by compiled-in failpoints: survivors raise in time, nothing hangs.

No bit is wrong: every collective of every rank is checked (fault_rank.py).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fault_job import BOUND, FaultJob
from roundel import _core

VICTIM = 1
SIZES = {"shm": 3, "tcp": 3, "hosts": 4}  # hosts: 0 and 2 on one, 1 and 3 on the other
START = [p for p in _core.failpoints() if p.startswith("start-")]
LEAVE = [p for p in _core.failpoints() if p.startswith("leave-")]
UNDER_WAY = [p for p in _core.failpoints() if p not in START + LEAVE]


def reached(point: str, transport: str) -> bool:
    """Whether a rank of a job over this transport passes the point at all."""
    if point.startswith("shm-"):
        return transport == "shm"
    if point in ("executor-round", "stream-retire"):
        return transport != "shm"  # streams carry only transfers there
    return not (point in ("start-before-memory", "start-after-memory") and transport == "tcp")


def cases(points: list[str]) -> list[tuple[str, str]]:
    return [(point, transport) for point in points for transport in SIZES if reached(point, transport)]


def test_every_failpoint_is_in_a_case():
    covered = {point for point, _ in cases(START) + cases(UNDER_WAY) + cases(LEAVE)}
    assert covered == set(_core.failpoints())
    assert len(covered) >= 20


@pytest.mark.parametrize(("point", "transport"), cases(UNDER_WAY))
def test_killed_under_way(point, transport, tmp_path):
    size = SIZES[transport]
    with FaultJob(size, transport, tmp_path, env_of={VICTIM: {"ROUNDEL_FAILPOINT": f"{point}=kill@60"}}) as job:
        ended = job.ended_at(VICTIM)
        for rank in set(range(size)) - {VICTIM}:
            error = job.error_of(rank)
            assert (error["error"], error["ranks"]) == ("PeerLostError", [VICTIM]), error
            assert "operation" in error["op"] or "recv" in error["op"] or "send" in error["op"], error
            assert error["at"] - ended < 3 * BOUND, error
            if transport != "tcp":  # where nobody on the host holds a pidfd, only the end of the connection is seen
                assert "killed by signal 9" in error["text"], error


UNKNOWN = ["start-connect", "start-hello"]  # the victim has not proved who it is


@pytest.mark.parametrize(("point", "transport"), cases(UNKNOWN))
def test_killed_before_anybody_knows_it(point, transport, tmp_path):
    """Nobody can tell its connection from a stranger's: it is missed at the start's deadline."""
    size, seconds = SIZES[transport], 2
    settings = {"ROUNDEL_START_TIMEOUT": str(seconds)}
    with FaultJob(size, transport, tmp_path, env=settings, env_of={VICTIM: {"ROUNDEL_FAILPOINT": f"{point}=kill"}}) as job:
        ended = job.ended_at(VICTIM)
        for rank in set(range(size)) - {VICTIM}:
            error = job.error_of(rank)
            assert error["error"] == "TimeoutError" and f"rank {VICTIM}" in error["text"], error
            assert error["at"] - ended < seconds + 3 * BOUND, error


@pytest.mark.parametrize(("point", "transport"), cases([p for p in START if p not in UNKNOWN]))
def test_killed_during_the_start(point, transport, tmp_path):
    """Who has met rank 0 and dies is noticed at once, by all who have met it too. Here the victim comes last of all."""
    size = SIZES[transport]
    victim = {"ROUNDEL_FAILPOINT": f"{point}=kill", "COMES_LATE_SECONDS": "0.7"}
    with FaultJob(size, transport, tmp_path, env_of={VICTIM: victim}) as job:
        ended = job.ended_at(VICTIM)
        for rank in set(range(size)) - {VICTIM}:
            error = job.error_of(rank)
            assert (error["error"], error["ranks"]) == ("PeerLostError", [VICTIM]), error
            assert error["at"] - ended < 3 * BOUND, error
            assert "start" in error["text"], error
            if transport != "hosts" and point != "start-card":  # where rank 0 is on its host and knows its process
                assert "killed by signal 9 (Killed)" in error["text"], error


@pytest.mark.parametrize(("point", "transport"), cases([p for p in START if p not in (*UNKNOWN, "start-card")]))
def test_what_ends_the_start_of_one_rank_ends_everybodys(point, transport, tmp_path):
    size = SIZES[transport]
    with FaultJob(size, transport, tmp_path, env_of={VICTIM: {"ROUNDEL_FAILPOINT": f"{point}=error"}}) as job:
        errors = [job.error_of(rank) for rank in range(size)]
        for error in errors:
            assert error["error"] == "RoundelError" and f"failpoint {point}" in error["text"], error
        assert max(e["at"] for e in errors) - errors[VICTIM]["at"] < 3 * BOUND, errors


@pytest.mark.parametrize("point", ["stream-queued", "stream-header-sent", "stream-received"])
@pytest.mark.parametrize("transport", ["tcp", "hosts"])
def test_killed_while_the_engine_opens(transport, point, tmp_path):
    """Its first operations are those of a split: members of the new group wait for one that only the job knows to be lost."""
    size = SIZES[transport]
    for count in (2, 4, 6):
        kept = tmp_path / str(count)
        kept.mkdir()
        with FaultJob(size, transport, kept, env_of={VICTIM: {"ROUNDEL_FAILPOINT": f"{point}=kill@{count}"}}) as job:
            ended = job.ended_at(VICTIM)
            for rank in set(range(size)) - {VICTIM}:
                error = job.error_of(rank)
                assert (error["error"], error["ranks"]) == ("PeerLostError", [VICTIM]), error
                assert error["at"] - ended < 3 * BOUND, error


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_death_while_others_are_awaited_is_noticed_at_once(transport, tmp_path):
    """Rank 3 is not there yet when rank 1 goes, and hears of it when it comes in the same second."""
    late = {"COMES_LATE_SECONDS": "1000"}
    with FaultJob(4, transport, tmp_path, env_of={3: late}) as job:
        job.wait_connected(1)
        time.sleep(0.3)  # its card is on the way
        killed = job.kill(1)
        for rank in (0, 2):
            error = job.error_of(rank)
            assert (error["error"], error["ranks"]) == ("PeerLostError", [1]), error
            assert "the job could not start: rank 1 ended during the start: killed by signal 9 (Killed)" in error["text"], error
            assert error["at"] - killed < 3 * BOUND, error


def test_who_comes_right_after_a_death_hears_of_it(tmp_path):
    with FaultJob(3, "tcp", tmp_path, env_of={1: {"ROUNDEL_FAILPOINT": "start-card=kill"}, 2: {"COMES_ON_ORDER": "1"}}) as job:
        job.ended_at(1)
        job.processes[2].stdin.write("come\n")
        job.processes[2].stdin.flush()
        for rank in (0, 2):
            error = job.error_of(rank)
            assert (error["error"], error["ranks"]) == ("PeerLostError", [1]), error


def test_rank_0_that_dies_while_others_are_awaited_is_named_at_once(tmp_path):
    with FaultJob(3, "shm", tmp_path, env_of={2: {"COMES_LATE_SECONDS": "1000"}}) as job:
        job.wait_connected(1)
        time.sleep(0.2)
        killed = job.kill(0)
        error = job.error_of(1)
        assert (error["error"], error["ranks"]) == ("PeerLostError", [0]), error
        assert "rank 0 went away during the start" in error["text"] and error["at"] - killed < 3 * BOUND, error


@pytest.mark.parametrize(("point", "transport"), cases(LEAVE))
def test_killed_while_leaving(point, transport, tmp_path):
    """The others leave in order, and do not wait for the dead; who is still in its last operation may learn of a death."""
    size = SIZES[transport]
    settings = {VICTIM: {"ROUNDEL_FAILPOINT": f"{point}=kill"}}
    with FaultJob(size, transport, tmp_path, "some", env_of=settings) as job:
        ended = job.ended_at(VICTIM)
        for rank in set(range(size)) - {VICTIM}:
            told = job.told(rank)
            last = next((line for line in told if "left" in line or "error" in line), {})
            died_without_goodbye = point == "leave-before" and last.get("ranks") == [VICTIM]
            assert "left" in last or died_without_goodbye, told
            assert last["at"] - ended < 3 * BOUND, last


def take_number(pid: int) -> subprocess.Popen:
    """A process with the number of one that has ended and was reaped."""
    last = Path("/proc/sys/kernel/ns_last_pid")
    if not os.access(last, os.W_OK):
        pytest.skip("only root may choose a process's number")
    for _ in range(200):
        last.write_text(str(pid - 1))
        process = subprocess.Popen(["sleep", "60"])
        if process.pid == pid:
            return process
        process.kill()
        process.wait()
    pytest.skip("others were always faster to take the number")


@pytest.mark.parametrize("transport", ["shm", "tcp", "hosts"])
def test_a_process_that_takes_a_dead_ranks_number_is_not_taken_for_it(transport, tmp_path):
    """The survivors are stopped meanwhile, so that they look when the number has its next owner."""
    size = SIZES[transport]
    survivors = sorted(set(range(size)) - {VICTIM})
    with FaultJob(size, transport, tmp_path, "mixed", 3) as job:
        job.wait_running()
        for rank in survivors:
            job.processes[rank].send_signal(signal.SIGSTOP)
        job.kill(VICTIM)
        job.processes[VICTIM].wait()
        successor = take_number(job.processes[VICTIM].pid)
        try:
            went_on = time.time()
            for rank in survivors:
                job.processes[rank].send_signal(signal.SIGCONT)
            for rank in survivors:
                error = job.error_of(rank)
                assert (error["error"], error["ranks"]) == ("PeerLostError", [VICTIM]), error
                assert error["at"] - went_on < 3 * BOUND, error
            assert successor.poll() is None
        finally:
            successor.kill()
            successor.wait()


CAUSES = {
    "segv": "ended without shutdown: killed by signal 11 (Segmentation fault)",
    "exit": "ended without shutdown: exit code 3",
    "kill": "ended without shutdown: killed by signal 9 (Killed)",
}


@pytest.mark.parametrize("how", CAUSES)
@pytest.mark.parametrize(("point", "transport"), [("shm-published", "shm"), ("executor-round", "hosts")])
def test_the_cause_is_named_on_every_survivor(how, point, transport, tmp_path):
    victim = 2
    with FaultJob(4, transport, tmp_path, env_of={victim: {"ROUNDEL_FAILPOINT": f"{point}={how}@60"}}) as job:
        ended = job.ended_at(victim)
        for rank in (0, 1, 3):
            error = job.error_of(rank)
            assert (error["error"], error["ranks"]) == ("PeerLostError", [victim]), error
            assert CAUSES[how] in error["text"], error
            assert error["at"] - ended < 3 * BOUND, error


@pytest.mark.parametrize("point", ["stream-received", "stream-header-received"])
def test_a_flipped_bit_on_the_wire_is_an_error_on_every_rank(point, tmp_path):
    with FaultJob(3, "tcp", tmp_path, env_of={2: {"ROUNDEL_FAILPOINT": f"{point}=flip@80"}}) as job:
        for rank in range(3):
            error = job.error_of(rank)
            assert error["error"] == "CorruptFrameError", error
            assert "rank 2" in error["text"], error


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_an_error_of_one_rank_is_everybodys(transport, tmp_path):
    point = "shm-staged" if transport == "shm" else "stream-retire"
    with FaultJob(3, transport, tmp_path, env_of={0: {"ROUNDEL_FAILPOINT": f"{point}=error@60"}}) as job:
        for rank in range(3):
            error = job.error_of(rank)
            assert error["error"] == "RoundelError" and f"failpoint {point}" in error["text"], error


@pytest.mark.parametrize("transport", ["shm", "tcp", "hosts"])
def test_a_pause_at_a_failpoint_is_no_error(transport, tmp_path):
    point = "shm-staged" if transport == "shm" else "stream-half-sent"
    size = SIZES[transport]
    with FaultJob(size, transport, tmp_path, "some", env_of={1: {"ROUNDEL_FAILPOINT": f"{point}=sleep:0.3@3"}}) as job:
        for rank in range(size):
            assert "left" in job.told(rank)[-1]


WRONG = ["nowhere=kill", "shm-staged", "shm-staged=", "shm-staged=burn", "shm-staged=kill@0", "shm-staged=kill@x"]


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_setting_is_named(text, tmp_path):
    with FaultJob(1, "shm", tmp_path, env={"ROUNDEL_FAILPOINT": text}) as job:
        error = job.error_of(0)
        assert error["error"] == "InvalidArgumentError" and text in error["text"], error


def test_a_shared_memory_of_1_mb_is_enough(tmp_path):
    """Shared memory of ranks has no name in /dev/shm: its size does not matter (NetLab hosts have their own; here a mount)."""
    why = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False)
    if why.returncode != 0:
        pytest.skip("mount namespaces need root")
    with FaultJob(2, "shm", tmp_path, "some", before=["unshare", "--mount", "sh", "-c",
                  'mount -t tmpfs -o size=1m none /dev/shm && exec "$0" "$@"']) as job:  # fmt: skip
        for rank in range(2):
            assert "left" in job.told(rank)[-1], job.error_output(rank)


def test_a_limit_of_address_space_is_an_error_or_no_matter_but_never_a_fault(tmp_path):
    # KiB: enough for small segments, and plenty. With less the stack of a process cannot grow, which no library can mend.
    for limit in (1_500_000, 6_000_000):
        with FaultJob(2, "shm", tmp_path, "some", before=["sh", "-c", f'ulimit -v {limit}; exec "$0" "$@"']) as job:
            for rank in range(2):
                told = job.told(rank)
                assert job.processes[rank].returncode in (0, 1), (limit, job.error_output(rank))
                if limit >= 6_000_000:
                    assert "left" in told[-1], (limit, told, job.error_output(rank))


def test_a_skipped_collective_is_warned_of_by_name_and_aborted_at_the_deadline(tmp_path):
    settings = {"ROUNDEL_TIMEOUT": "3", "ROUNDEL_STALL_CHECK_SECONDS": "1", "LATE_SECONDS": "1000"}
    with FaultJob(3, "shm", tmp_path, "late", env=settings) as job:
        started = time.time()
        for rank in (0, 1):
            error = job.error_of(rank)
            assert error["error"] == "TimeoutError" and error["at"] - started < 3 + 3 * BOUND, error
            assert "all-reduce 'layer.weight' (operation 5) timed out after 3 s waiting for rank 2" in error["text"], error
            assert "rank 2 is in no operation; its last, barrier (operation 4), ended" in error["text"], error
            warnings = [line for line in job.error_output(rank).splitlines() if "warning" in line]
            assert len(warnings) == 1, warnings
            assert "all-reduce 'layer.weight' (operation 5) has waited 1 s for rank 2" in warnings[0]


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_flight_records_of_all_ranks_say_where_they_diverge(transport, tmp_path):
    settings = {"ROUNDEL_TIMEOUT": "1.5", "LATE_SECONDS": "3", "ROUNDEL_FLIGHT_RECORD": str(tmp_path / "flight")}
    with FaultJob(3, transport, tmp_path, "late", env=settings) as job:
        for rank in range(3):
            job.error_of(rank)
    files = sorted(tmp_path.glob("flight.rank*.json"))
    assert len(files) == 3
    head, *entries = [json.loads(line) for line in files[0].read_text().splitlines()]
    assert head["rank"] == 0 and head["size"] == 3 and "timed out" in head["why"]
    assert [e["sequence"] for e in entries][-2:] == [4, 5]  # after what the start has called
    assert entries[0]["state"] == "done" and entries[0]["queued"] <= entries[0]["started"] <= entries[0]["finished"]
    last = entries[-1]
    assert (last["state"], last["name"], last["waiting_for"], last["bytes"]) == ("failed", "layer.weight", [2], 40)
    assert 1.4 < last["finished"] - last["started"] < 4
    said = subprocess.run([sys.executable, "-m", "roundel.flight", str(tmp_path)], capture_output=True, text=True, check=False)
    assert said.returncode == 1, said
    assert "operation 5 differs: ranks 0, 1 called all-reduce of 10 float32" in said.stdout, said.stdout
    assert "rank 2 called barrier" in said.stdout and "waiting for rank 2" in said.stdout, said.stdout
