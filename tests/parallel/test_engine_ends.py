"""How requests end that do not end well: lost ranks, late ranks, ranks that leave, signals. Programs of three ranks."""

from __future__ import annotations

import pytest
from test_start import outputs, start_by_hand

HEAD = """
import os, signal, threading, time
import numpy as np, roundel
from roundel.world import engine
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs without
roundel.init()
rank, x, e = roundel.rank(), np.ones(3), engine()
def ready(name, **more): return e.allreduce([x], op=0, name=name, **more)
def ends_with(kind, name, handle=None):  # when it is asked for already, or when it is waited for
    try:
        (handle or ready(name)).wait()
    except kind as error:
        return str(error)
    raise SystemExit("no error")
ready("start").wait()
"""

# The program, and the settings that it needs.
PROGRAMS = {
    "a killed rank is named to all that wait": (
        """
if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
began = time.monotonic()
try:
    ready("never").wait()
    raise SystemExit("no error")
except roundel.PeerLostError as error:
    assert error.ranks == (1,), error
assert time.monotonic() - began < 3
ends_with(roundel.PeerLostError, "again")
""",
        {},
    ),
    "a rank that has left is named to those that need it": (
        """
if rank == 2:
    roundel.shutdown()
else:
    text = ends_with(roundel.PeerLostError, "never")
    assert "rank 2" in text, text
""",
        {},
    ),
    "rank 0 leaves while the others have nothing to do": (
        """
if rank == 0:
    roundel.shutdown()
else:
    time.sleep(0.3)
    ends_with(roundel.PeerLostError, "never")
""",
        {},
    ),
    "a process set goes on without a rank that left": (
        """
number = e.add_process_set([0, 1]).wait()
if rank == 2:
    roundel.shutdown()
else:
    time.sleep(0.3)
    assert (ready("x", process_set=number).wait()[0] == 2).all()
""",
        {},
    ),
    "shutdown ends what is pending": (
        """
handle = ready("never") if rank == 0 else None
time.sleep(0.1 if rank == 0 else 1)  # had they left first, that would end it, and say so
roundel.shutdown()
if rank == 0:
    assert "shut down" in ends_with(roundel.RoundelError, "never", handle)
""",
        {},
    ),
    "init may follow shutdown": (
        """
for round in range(3):
    assert (ready(f"round {round}").wait()[0] == 3).all()
    e.barrier().wait()
    roundel.communicator().barrier()
    if round < 2:
        roundel.shutdown()
        time.sleep(0.2)
        roundel.init()
        e = engine()
""",
        {},
    ),
    "a stall is told once and the job goes on": (
        """
if rank == 1:
    time.sleep(2.5)
handle = ready("fc.weight")
assert (handle.wait()[0] == 3).all()
""",
        {"ROUNDEL_STALL_CHECK_SECONDS": "1"},
    ),
    "a stall ends the job after its second bound": (
        """
began = time.monotonic()
if rank == 1:
    time.sleep(3)
text = ends_with(roundel.TimeoutError, "fc.weight")
assert "allreduce 'fc.weight' has waited" in text and "for rank 1" in text and "rank 0 and 2 are ready" in text, text
assert "ROUNDEL_STALL_SHUTDOWN_SECONDS is 1 s" in text, text
assert time.monotonic() - began < 5
""",
        {"ROUNDEL_STALL_SHUTDOWN_SECONDS": "1", "ROUNDEL_STALL_CHECK_SECONDS": "0.5"},
    ),
    "no request outlives ROUNDEL_TIMEOUT": (
        """
if rank == 1:
    time.sleep(4)
else:
    began = time.monotonic()
    text = ends_with(roundel.TimeoutError, "fc.weight")
    assert "for rank 1" in text and "ROUNDEL_TIMEOUT is 1 s" in text, text
    assert time.monotonic() - began < 4
""",
        {"ROUNDEL_TIMEOUT": "1"},
    ),
    "Ctrl-C ends a wait and the request goes on": (
        """
handle = None
if rank == 0:
    handle = ready("late")
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    try:
        handle.wait()
        raise SystemExit("not interrupted")
    except KeyboardInterrupt:
        pass
else:
    time.sleep(0.8)
    handle = ready("late")
assert (handle.wait()[0] == 3).all()
assert (ready("after").wait()[0] == 3).all()
""",
        {},
    ),
    "a signal handler may shut down in the middle of a wait": (
        """
if rank == 0:
    signal.signal(signal.SIGALRM, lambda *_: roundel.shutdown())
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    assert "shut down" in ends_with(roundel.RoundelError, "never")
else:
    time.sleep(0.8)
    ends_with(roundel.PeerLostError, "never")
""",
        {},
    ),
    "a signal handler that makes a request gets an error": (
        """
seen = []
def handler(*_):
    try:
        ready("from a handler").wait()
    except roundel.RoundelError as error:
        seen.append(str(error))
if rank == 0:
    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
else:
    time.sleep(0.8)
assert (ready("late").wait()[0] == 3).all()
assert rank != 0 or "signal handler" in seen[0], seen
""",
        {},
    ),
    "a forked child is told that it is no rank": (
        """
child = os.fork()
if child == 0:
    try:
        ready("in a child")
    except roundel.RoundelError as error:
        os._exit(0 if "forked" in str(error) else 1)
    os._exit(2)
assert os.waitpid(child, 0)[1] == 0
assert (ready("parent").wait()[0] == 3).all()
""",
        {},
    ),
    "requests are served while their callers do something else": (
        """
handles = [ready(f"x{i}") for i in range(20)]
deadline = time.monotonic() + 5
while not all(handle.done() for handle in handles):
    assert time.monotonic() < deadline
    time.sleep(0.01)
""",
        {},
    ),
    "several threads wait for requests of one another": (
        """
errors = []
def work(number):
    try:
        for i in range(50):
            assert (ready(f"{number}.{i}").wait()[0] == 3).all()
    except BaseException as error:
        errors.append(error)
threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
[t.start() for t in threads]; [t.join() for t in threads]
assert not errors, errors
""",
        {},
    ),
    "a forked child does not wait for its parent's requests": (
        """
handle = ready("parent") if rank == 0 else None
child = os.fork()
if child == 0:
    signal.alarm(3)
    try:
        (handle or ready("parent")).wait()
    except roundel.RoundelError as error:
        os._exit(0 if "forked" in str(error) else 1)
    os._exit(2)
assert os.waitpid(child, 0)[1] == 0
assert ((handle or ready("parent")).wait()[0] == 3).all()
""",
        {},
    ),
    "a rank that left is named whoever hears of it": (
        """
number = e.add_process_set([0, 2]).wait()
if rank == 2:
    roundel.shutdown()
elif rank == 0:
    began = time.monotonic()
    text = ends_with(roundel.PeerLostError, "never", ready("never", process_set=number))
    assert "rank 2" in text and "left" in text and time.monotonic() - began < 5, text
else:
    time.sleep(2)
""",
        {},
    ),
    "rank 0 leaves and only one of the others wants something": (
        """
if rank == 2:
    time.sleep(0.5)
    began = time.monotonic()
    ends_with(roundel.PeerLostError, "never")
    assert time.monotonic() - began < 3
elif rank == 1:
    time.sleep(2)
roundel.shutdown()
""",
        {},
    ),
    "join needs all ranks, and says who has left": (
        """
if rank == 2:
    roundel.shutdown()
else:
    began = time.monotonic()
    text = ends_with(roundel.PeerLostError, "join", e.join())
    assert "rank 2" in text and "left" in text and time.monotonic() - began < 5, text
""",
        {},
    ),
    "join waits for as long as others go on": (
        """
if rank != 2:
    for i in range(7):
        time.sleep(0.6)
        ready(f"x{i}").wait()
assert e.join().wait() in (0, 1)
assert (ready("after").wait()[0] == 3).all()
""",
        {"ROUNDEL_TIMEOUT": "1.5"},
    ),
    "join outlives ROUNDEL_TIMEOUT no more than others do": (
        """
if rank == 1:
    time.sleep(4)
else:
    began = time.monotonic()
    text = ends_with(roundel.TimeoutError, "join", e.join())
    assert "join 'join' has waited" in text and "for rank 1; rank 0 and 2 are ready" in text, text
    assert time.monotonic() - began < 4
""",
        {"ROUNDEL_TIMEOUT": "1"},
    ),
    "late ranks are told apart from those whose host waits": (
        """
if rank == 1:
    time.sleep(4)
else:
    text = ends_with(roundel.TimeoutError, "fc.weight")
    assert "for rank 1; rank 0 and 2 are ready" in text and "ROUNDEL_TIMEOUT is 2 s" in text, text
""",
        {"ROUNDEL_TIMEOUT": "2"},
    ),
    "one loss ends all process sets": (
        """
left, right = e.add_process_set([0, 1]).wait(), e.add_process_set([1, 2]).wait()
ends = {}
def loop(name, number):
    try:
        while True:
            ready(name, process_set=number).wait()
    except Exception as error:
        ends[name] = error
threads = [threading.Thread(target=loop, args=a) for a in [("l", left)][: rank < 2] + [("r", right)][: rank > 0]]
began = time.monotonic()
[t.start() for t in threads]
time.sleep(0.5)
if rank == 2:
    os.kill(os.getpid(), signal.SIGKILL)  # killed
[t.join() for t in threads]
assert time.monotonic() - began < 5
assert all(isinstance(end, roundel.PeerLostError) and 2 in end.ranks for end in ends.values()), ends
""",
        {},
    ),
    "a loss of another rank is noticed after a request that did not need it": (
        """
left = e.add_process_set([0, 1]).wait()
if rank == 2:
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)
large, began = np.ones(1 << 23), time.monotonic()
try:
    while time.monotonic() - began < 10:  # most of the time inside an operation, which rank 2 has no part in
        e.allreduce([large], op=0, name="large", process_set=left).wait()
    raise SystemExit("no error")
except roundel.PeerLostError as error:
    assert 2 in error.ranks, error
""",
        {},
    ),
    "waiting costs next to nothing": (
        """
if rank == 0:
    time.sleep(2)
    ready("late").wait()
else:
    began = time.process_time()
    ready("late").wait()
    spent = time.process_time() - began
    assert spent < 0.3, spent
""",
        {},
    ),
}


# Two hosts have both a host's memory and TCP; memory alone is for the soak, since most of these wait for seconds.
@pytest.mark.parametrize("transport", [pytest.param("shm", marks=pytest.mark.soak), "hosts"])
@pytest.mark.parametrize("what", PROGRAMS)
def test_that(what, transport, tmp_path):
    body, settings = PROGRAMS[what]
    places = {r: {"ROUNDEL_HOST_ID": f"host {min(r, 1)}"} if transport == "hosts" else {} for r in range(3)}
    changes = {f"rank{r}": settings | places[r] for r in range(3)}
    results = outputs(start_by_hand(3, HEAD + body + 'print("fine")\n', tmp_path, transport=transport, **changes))
    for rank, (code, out, err) in enumerate(results):
        if ("killed" in what and rank == 1) or ("loss" in what and rank == 2):
            continue
        assert code == 0 and out == "fine\n", (rank, err)
    if "told once" in what:
        assert results[0][2].count("allreduce 'fc.weight' has waited 1 s for rank 1; rank 0 and 2 are ready for it") == 1


def test_fusion_thresholds_may_differ_between_ranks(tmp_path):
    body = """
handles = [ready(f"x{i}") for i in range(40)]
assert all((h.wait()[0] == 3).all() for h in handles)
"""
    changes = {f"rank{r}": {"ROUNDEL_FUSION_THRESHOLD": str(100 * r)} for r in range(3)}
    for code, out, err in outputs(start_by_hand(3, HEAD + body + 'print("fine")\n', tmp_path, **changes)):
        assert code == 0 and out == "fine\n", err
