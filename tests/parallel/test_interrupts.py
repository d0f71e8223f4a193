"""Signals, forks, threads and patience: calls that are cut short must not hang, crash, or write where they no longer may."""

from __future__ import annotations

import pytest
from test_start import outputs, start_by_hand

HEAD = """
import os, signal, threading, time
import numpy as np, roundel
roundel.init()
comm = roundel.communicator()
rank = comm.rank
def interrupt_after(seconds):
    threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
"""

PROGRAMS = {
    # A child's garbage collection must not punch holes into its parent's memory.
    "a forked child lets go of its parent's buffers": """
x = comm.allocate(1 << 20)
x[:] = 7
child = os.fork()
if child == 0:
    del x
    os._exit(0)
os.waitpid(child, 0)
assert (x == 7).all()
""",
    "calls after Ctrl-C raise again and again": """
if rank == 0:
    interrupt_after(0.3)
    try:
        comm.allreduce(np.ones(3)); comm.allreduce(np.ones(3))
        raise SystemExit("not interrupted")
    except KeyboardInterrupt:
        pass
    for _ in range(3):
        try:
            comm.barrier()
            raise SystemExit("no error")
        except roundel.RoundelError as error:
            assert "KeyboardInterrupt" in str(error)
else:
    time.sleep(1)
""",
    "an interrupted receive no longer writes": """
if rank == 0:
    interrupt_after(0.3)
    y = np.zeros(1000)
    try:
        comm.recv(y, 1)
        raise SystemExit("not interrupted")
    except KeyboardInterrupt:
        pass
    time.sleep(1)
    assert (y == 0).all()
else:
    time.sleep(0.8)
    try:
        comm.send(np.ones(1000), 0)
    except roundel.RoundelError:
        pass
    time.sleep(0.5)
""",
    "a signal handler may shut down in the middle of an operation": """
if rank == 0:
    signal.signal(signal.SIGALRM, lambda *_: roundel.shutdown())
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        comm.allreduce(np.ones(3)); comm.allreduce(np.ones(3))
        raise SystemExit("no error")
    except roundel.RoundelError as error:
        assert "shut down" in str(error)
else:
    time.sleep(1)
    try:
        comm.allreduce(np.ones(3)); comm.allreduce(np.ones(3))
        raise SystemExit("no error")
    except roundel.PeerLostError as error:
        assert error.ranks == (0,)
""",
    "a signal handler that calls a collective gets an error": """
seen = []
def handler(*_):
    try:
        comm.barrier()
    except roundel.RoundelError as error:
        seen.append(str(error))
if rank == 0:
    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
else:
    time.sleep(1)
assert comm.allreduce(np.ones(3))[0] == 2
assert rank != 0 or "signal handler" in seen[0]
""",
    "read-only arrays may be broadcast by root": """
for n in (3, 100_000):
    x = np.full(n, rank, dtype=np.float64)
    x.flags.writeable = rank == 0
    comm.broadcast(x, 1)
    assert (x == 1).all()
""",
    "a short deadline holds behind patient operations": """
if rank == 0:
    pending = comm.recv_async(np.ones(3), 1, timeout=30)
    queued = comm.allreduce_async(np.ones(3), timeout=30)
    started = time.monotonic()
    try:
        comm.recv(np.ones(3), 1, timeout=0.5)
        raise SystemExit("no error")
    except TimeoutError as error:
        assert "0.5 s" in str(error), error
    assert time.monotonic() - started < 2
else:
    time.sleep(2)
""",
    "patience may be endless": """
for timeout in (float("inf"), 1e300):
    assert comm.allreduce(np.ones(3), timeout=timeout)[0] == 2
try:
    comm.barrier(timeout=float("nan"))
    raise SystemExit("no error")
except roundel.InvalidArgumentError:
    pass
""",
    "a large send does not stand in the way of a collective": """
big = np.zeros(80 << 20, np.uint8)
if rank == 0:
    handle = comm.send_async(big, 1)
assert comm.allreduce(np.ones(3))[0] == 2
if rank == 1:
    comm.recv(big, 0)
else:
    handle.wait()
for _ in range(3):
    started = time.monotonic()
    comm.allreduce(np.ones(300_000, np.float32))
assert time.monotonic() - started < 1
""",
    "several threads may shut down": """
comm.barrier()
threads = [threading.Thread(target=comm.shutdown, args=(0.5,)) for _ in range(3)]
[t.start() for t in threads]; [t.join() for t in threads]
""",
}


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("what", PROGRAMS)
def test_that(what, transport, tmp_path):
    program = HEAD + PROGRAMS[what] + 'print("fine")\n'
    for code, out, err in outputs(start_by_hand(2, program, tmp_path, transport=transport)):
        assert code == 0 and out == "fine\n", err


def test_that_init_can_be_interrupted(tmp_path):
    program = """
import os, signal, threading, time
import roundel
threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
started = time.monotonic()
try:
    roundel.init()
except KeyboardInterrupt:
    assert time.monotonic() - started < 3
    print("fine")
"""
    for rank in (0, 1):
        [(code, out, err)] = outputs(start_by_hand(2, program, tmp_path, **{f"rank{1 - rank}": None}))
        assert code == 0 and out == "fine\n", err
