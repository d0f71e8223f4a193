"""roundelrun on one host: what ranks get, what is shown of them, and that nothing outlives the job."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest
from roundel.launch.guard import descendants
from roundel.launch.output import HIGH_WATER, MAX_LINE, Lines

TIMEOUT = 60  # of one job, on a loaded machine; all of them take about a second


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "roundel.launch", *map(str, arguments)]


def python(code: str, *arguments: str) -> list[str]:
    """A rank's command: a Python that starts fast."""
    return [sys.executable, "-S", "-c", code, *arguments]


def clean_environment(**more: str) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("ROUNDEL_") and k not in DEFAULTS}
    return env | more


DEFAULTS = ("OMP_NUM_THREADS", "PYTHONUNBUFFERED")


def roundelrun(*arguments: object, stdin=subprocess.DEVNULL, **env: str) -> subprocess.CompletedProcess:
    """Run a job to its end. The output is bytes."""
    return subprocess.run(command(*arguments), stdin=stdin, capture_output=True, timeout=TIMEOUT, env=clean_environment(**env))


@contextlib.contextmanager
def running(*arguments: object, ready: int, **options):
    """A job of which `ready` lines of output have been read. Killed after TIMEOUT, whatever it does."""
    process = subprocess.Popen(
        command(*arguments), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=clean_environment(), preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler), **options,
    )  # fmt: skip
    watchdog = threading.Timer(TIMEOUT, process.kill)
    watchdog.start()
    try:
        process.first_lines = [process.stdout.readline() for _ in range(ready)]
        assert all(process.first_lines), process.stderr.read()
        yield process
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def lines_of(output: bytes, rank: int, stream: str = "stdout") -> list[bytes]:
    prefix = b"[%d]<%s>: " % (rank, stream.encode())
    return [line.removeprefix(prefix) for line in output.splitlines() if line.startswith(prefix)]


def alive(marker: str) -> list[int]:
    """Living processes that have `marker` in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[0]
                if state not in "ZX" and marker.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
    return found


def wait_until(condition, seconds: float = TIMEOUT) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not true within {seconds} s"
        time.sleep(0.02)


@pytest.fixture
def marker():
    name = f"marker-{uuid.uuid4().hex}"
    yield name
    for pid in alive(name):  # a failed test must not leave its processes to the next
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


# -- what a rank gets


def test_each_rank_gets_its_place_and_what_it_needs_to_meet_the_others():
    code = """
import os, socket
e = os.environ
token = os.pread(int(e["ROUNDEL_TOKEN_FD"]), 100, 0)
print(e["ROUNDEL_RANK"], e["ROUNDEL_SIZE"], e["ROUNDEL_LOCAL_RANK"], e["ROUNDEL_LOCAL_SIZE"], len(token), hash(token))
port = int(e["ROUNDEL_RENDEZVOUS"].removeprefix("127.0.0.1:"))
fds = set()
for fd in range(3, 1000):
    try: os.fstat(fd)
    except OSError: continue
    fds.add(fd)
expected = {int(e["ROUNDEL_TOKEN_FD"])}
if "ROUNDEL_RENDEZVOUS_FD" in e:
    fd = int(e["ROUNDEL_RENDEZVOUS_FD"])
    expected.add(fd)
    listener = socket.socket(fileno=os.dup(fd))
    print("listens", listener.getsockname() == ("127.0.0.1", port))
    with socket.create_connection(("127.0.0.1", port)): listener.accept()
print("inherited too", sorted(fds - expected))
try:
    os.write(int(e["ROUNDEL_TOKEN_FD"]), b"x")
except OSError as error:
    print(type(error).__name__)
"""
    job = roundelrun("-np", 3, *python(code), PYTHONHASHSEED="0", ROUNDEL_RENDEZVOUS_FD="77", ROUNDEL_TOKEN_FILE="/x")
    assert (job.returncode, job.stderr) == (0, b"")
    tokens = set()
    for rank in range(3):
        place, *rest = lines_of(job.stdout, rank)
        *numbers, token_length, token = place.split()
        assert [int(n) for n in numbers] == [rank, 3, rank, 3]
        assert token_length == b"32"
        tokens.add(token)
        assert rest == [b"listens True"] * (rank == 0) + [b"inherited too []", b"PermissionError"]
    assert len(tokens) == 1


def test_two_jobs_have_different_tokens():
    code = "import os; print(os.pread(int(os.environ['ROUNDEL_TOKEN_FD']), 32, 0).hex())"
    tokens = {roundelrun("-np", 1, *python(code)).stdout for _ in range(2)}
    assert len(tokens) == 2 and all(len(token) > 64 for token in tokens)


def test_the_token_is_in_no_command_line_environment_or_output(tmp_path):
    code = """
import os, sys, time
token = os.pread(int(os.environ["ROUNDEL_TOKEN_FD"]), 32, 0)
open(sys.argv[1] + os.environ["ROUNDEL_RANK"], "wb").write(token)
print("ready")
time.sleep(100)
"""
    with running("-np", 2, "--verbose", *python(code, str(tmp_path / "token")), ready=2) as job:
        token = (tmp_path / "token0").read_bytes()
        assert len(token) == 32 and token == (tmp_path / "token1").read_bytes()
        forms = (token, token.hex().encode(), repr(token)[2:-1].encode())
        seen = 0
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                for name in ("cmdline", "environ"):
                    with contextlib.suppress(OSError):
                        content = (entry / name).read_bytes()
                        seen += b"ROUNDEL_RENDEZVOUS=" in content
                        assert not any(form in content for form in forms), (entry, name)
        assert seen >= 3  # the guard and both ranks were looked at
        job.send_signal(signal.SIGTERM)
        out, err = job.communicate(timeout=TIMEOUT)
        assert not any(form in out + err for form in forms)


def test_options_become_variables():
    code = "import os; print(*(os.environ.get(k) for k in ('ROUNDEL_START_TIMEOUT', 'ROUNDEL_TIMEOUT',"
    code += " 'ROUNDEL_TRANSPORT', 'OMP_NUM_THREADS', 'PYTHONUNBUFFERED')))"
    job = roundelrun("-np", 1, "--start-timeout", 7, "--timeout", 2.5, "--transport", "tcp", *python(code))
    assert lines_of(job.stdout, 0) == [b"7 2.5 tcp %d 1" % len(os.sched_getaffinity(0))]
    job = roundelrun("-np", 1, *python(code), OMP_NUM_THREADS="3", ROUNDEL_TIMEOUT="9", PYTHONUNBUFFERED="")
    assert lines_of(job.stdout, 0) == [b"None 9 None 3 "]


def test_rank_0_inherits_stdin_and_the_others_have_none():
    with subprocess.Popen(["printf", "from outside"], stdout=subprocess.PIPE) as source:
        job = roundelrun("-np", 2, *python("import sys; print(repr(sys.stdin.read()))"), stdin=source.stdout)
    assert lines_of(job.stdout, 0) == [b"'from outside'"]
    assert lines_of(job.stdout, 1) == [b"''"]


def test_twenty_ranks():
    job = roundelrun("-np", 20, "sh", "-c", "echo $ROUNDEL_RANK of $ROUNDEL_SIZE; sleep 0.2")
    assert job.returncode == 0
    assert sorted(job.stdout.splitlines()) == sorted(b"[%d]<stdout>: %d of 20" % (r, r) for r in range(20))


# -- the command line


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["-np", "0", "true"], 2, "at least 1"),
        (["-np", "-3", "true"], 2, "at least 1"),
        (["-np", "two", "true"], 2, "-np"),
        (["true"], 2, "-np N"),
        (["-np", "2"], 2, "command is missing"),
        (["-np", "2", "--"], 2, "command is missing"),
        (["-np", "2", "--grac", "1", "true"], 2, "usage"),
        (["-np", "2", "--grace", "soon", "true"], 2, "--grace"),
        (["-np", "2", "--timeout", "0", "true"], 2, "--timeout"),
        (["-np", "2", "--transport", "pigeon", "true"], 2, "--transport"),
        (["-np", "2", "no-such-command-here"], 127, "no-such-command-here"),
        (["-np", "2", "/dev/null"], 126, "Permission denied"),
        (["-np", "2", "/tmp"], 126, "Permission denied"),
    ],
)
def test_wrong_command_lines_are_explained(arguments, code, words):
    job = roundelrun(*arguments)
    assert job.returncode == code
    assert words in job.stderr.decode()
    assert b"Traceback" not in job.stderr and job.stdout == b""


def test_the_commands_own_options_and_dashes_reach_it():
    code = "import sys; print(sys.argv[1:])"
    job = roundelrun("-np", 1, "--", *python(code, "--grace", "--version", "-np", "--", "x y"))
    assert lines_of(job.stdout, 0) == [b"['--grace', '--version', '-np', '--', 'x y']"]
    assert roundelrun("--version").stdout.startswith(b"roundelrun ")


# -- output


def test_lines_carry_rank_and_stream():
    code = "import sys; print('one'); print('two\\n\\nthree'); sys.stderr.write('bad\\n'); sys.stdout.write('no end')"
    job = roundelrun("-np", 2, *python(code))
    for rank in range(2):
        assert lines_of(job.stdout, rank) == [b"one", b"two", b"", b"three", b"no end"]
        assert lines_of(job.stderr, rank, "stderr") == [b"bad"]
    assert len(job.stdout.splitlines()) == 10 and job.stdout.endswith(b"no end\n")


def test_a_hundred_thousand_lines_and_a_long_one_stay_whole():
    code = """
import os, sys
letter = chr(ord("a") + int(os.environ["ROUNDEL_RANK"]))
out = open(1, "w", buffering=1000)  # flushed in the middle of lines
for i in range(100_000 if letter == "a" else 1000):
    out.write(f"{i} {letter * 20}\\n")
out.write(letter * 500_000)
out.flush()
"""
    job = roundelrun("-np", 2, *python(code))
    assert job.returncode == 0
    for rank, letter, count in ((0, b"a", 100_000), (1, b"b", 1000)):
        assert lines_of(job.stdout, rank) == [b"%d %s" % (i, letter * 20) for i in range(count)] + [letter * 500_000]
    assert job.stdout.count(b"\n") == 101_002


def test_binary_garbage_passes():
    code = "import os; os.write(1, bytes(b for b in range(256) if b not in (10, 13)) + b'\\n\\xff\\xfe\\n')"
    job = roundelrun("-np", 1, *python(code))
    assert job.returncode == 0
    expected = bytes(b for b in range(256) if b not in (10, 13))
    assert job.stdout == b"[0]<stdout>: " + expected + b"\n[0]<stdout>: \xff\xfe\n"


BAR = """
import sys, time
for i in range(0, 101, 20):
    sys.stderr.write(f"\\r{i:3d}%|{'#' * i}")
    sys.stderr.flush()
    time.sleep(0.05)
sys.stderr.write("\\n")
print("done", end="\\r\\n")
"""


def test_of_a_progress_bar_only_the_last_state_is_kept_without_a_terminal():
    job = roundelrun("-np", 2, *python(BAR))
    for rank in range(2):
        assert lines_of(job.stderr, rank, "stderr") == [b"100%|" + b"#" * 100]
        assert lines_of(job.stdout, rank) == [b"done"]
    assert b"\r" not in job.stdout + job.stderr


def test_on_a_terminal_a_progress_bar_is_shown_as_it_goes():
    master, slave = pty.openpty()
    with subprocess.Popen(
        command("-np", 1, *python(BAR)), stdin=slave, stdout=slave, stderr=slave, env=clean_environment(TERM="xterm")
    ) as job:
        os.close(slave)
        seen = b""
        with contextlib.suppress(OSError):  # EIO: the other end is closed
            while data := os.read(master, 4096):
                seen += data
        os.close(master)
        assert job.wait(timeout=TIMEOUT) == 0
    updates = re.findall(rb"\r\x1b\[K\[0\]<stderr>: +(\d+)%", seen)
    assert [int(n) for n in updates] >= [0, 20] and updates[-1] == b"100" and len(updates) >= 4
    assert b"[0]<stderr>: 100%|" + b"#" * 100 + b"\r\n" in seen  # the whole last state, as a line
    assert b"[0]<stdout>: done\r\n" in seen


def test_no_prefix_hands_bytes_on_as_they_are():
    job = roundelrun("-np", 1, "--no-prefix", *python("import os; os.write(1, b'a\\r\\nb\\rc\\x00'); os.write(2, b'e')"))
    assert (job.stdout, job.stderr) == (b"a\r\nb\rc\x00", b"e")


def test_output_dir_keeps_each_ranks_bytes(tmp_path):
    directory = tmp_path / "a" / "b"
    code = "import os; r = os.environ['ROUNDEL_RANK'].encode(); os.write(1, b'out\\r' + r); os.write(2, b'err' + r)"
    assert roundelrun("-np", 2, "--output-dir", directory, *python(code)).returncode == 0
    found = {path.name: path.read_bytes() for path in directory.iterdir()}
    assert found == {"rank.0.out": b"out\r0", "rank.0.err": b"err0", "rank.1.out": b"out\r1", "rank.1.err": b"err1"}


def test_a_reader_that_goes_away_ends_the_job(marker):
    code = "import itertools\nfor i in itertools.count(): print(i)"
    with running("-np", 2, "--grace", 1, *python(code, marker), ready=5) as job:
        job.stdout.close()
        assert job.wait(timeout=TIMEOUT) == 128 + signal.SIGPIPE
    assert alive(marker) == []


def test_a_slow_reader_does_not_fill_the_launchers_memory():
    code = "import os\nfor _ in range(1200): os.write(1, (b'x' * 99 + b'\\n') * 1000)"  # 120 MB
    with running("-np", 1, *python(code), ready=1) as job:
        time.sleep(1.5)
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{job.pid}/status").read_text())
        assert int(peak[1]) < 100_000
        rest = sum(1 for _ in job.stdout)
        assert rest == 1_200_000 - 1
        assert job.wait(timeout=TIMEOUT) == 0


def test_what_a_rank_left_in_its_pipe_is_shown_however_late():
    size = HIGH_WATER + (1 << 16) + 60_000  # the launcher stops reading while the last part is in the rank's pipe
    code = f"import sys; sys.stdout.buffer.write(b'x' * {size})"
    with running("-np", 1, "--no-prefix", *python(code), ready=0) as job:
        wait_until(lambda: children(job.pid))
        wait_until(lambda: not descendants(job.pid))  # rank and guard have ended
        assert len(job.stdout.read()) == size
        assert job.wait(timeout=TIMEOUT) == 0


def test_lines_splits_at_any_border():
    data = b"one\r\ntwo 10%\rtwo 20%\rtwo 30%\n\nthree\r\r\nlast\r"
    for cut in range(len(data)):
        lines = Lines()
        found = lines.feed(data[:cut]) + lines.feed(data[cut:]) + lines.rest()
        assert found == [b"one", b"two 30%", b"", b"three", b"last"], cut
    endless = Lines()
    found = [line for _ in range(5) for line in endless.feed(b"x" * (MAX_LINE // 2))]
    assert found == [b"x" * MAX_LINE] * 2 and len(endless.pending) == MAX_LINE // 2


# -- ends


def test_exit_code_is_that_of_the_first_rank_to_fail_and_the_report_names_it():
    code = """
import os, sys, time
rank = int(os.environ["ROUNDEL_RANK"])
for i in range(15): print(f"line {i} of {rank}")
if rank == 1: time.sleep(0.5); sys.exit("no such file: data.bin")
if rank == 2: time.sleep(1.5); sys.exit(9)
if rank == 3: time.sleep(100)
"""
    job = roundelrun("-np", 4, "--grace", 3, *python(code))
    assert job.returncode == 1
    report = [line for line in job.stderr.decode().splitlines() if line.startswith("roundelrun: ")]
    assert re.fullmatch(r"roundelrun: rank 1 \(pid \d+\) failed first: it exited with code 1", report[0])
    last = [f"roundelrun:   <stdout> line {i} of 1" for i in range(6, 15)]
    assert report[2:12] == [*last, "roundelrun:   <stderr> no such file: data.bin"]
    assert re.fullmatch(r"roundelrun: rank 2 \(pid \d+\) exited with code 9", report[12])
    assert re.fullmatch(r"roundelrun: rank 3 \(pid \d+\) was stopped by the launcher with SIGTERM", report[13])
    assert len(report) == 14


def test_a_rank_killed_by_sigkill_is_reported_with_the_oom_killer_as_suspect():
    code = "import os, signal, sys, time\nif os.environ['ROUNDEL_RANK'] == '2': os.kill(os.getpid(), signal.SIGKILL)\n"
    start = time.monotonic()
    job = roundelrun("-np", 3, "--grace", 0.5, *python(code + "time.sleep(100)"))
    assert 0.5 < time.monotonic() - start < 20
    assert job.returncode == 137
    report = job.stderr.decode()
    assert re.match(r"roundelrun: rank 2 \(pid \d+\) failed first: it was killed by SIGKILL .*out-of-memory", report)
    assert "rank 2 has printed nothing" in report
    assert report.count("was stopped by the launcher with SIGTERM") == 2


def test_grace_lets_the_others_end_by_themselves():
    code = """
import os, signal, sys, time
if os.environ["ROUNDEL_RANK"] == "0": sys.exit(3)
signal.signal(signal.SIGTERM, lambda *_: print("terminated"))
time.sleep(1)
print("ended by itself")
"""
    job = roundelrun("-np", 2, "--grace", 30, *python(code))
    assert job.returncode == 3
    assert lines_of(job.stdout, 1) == [b"ended by itself"]


def test_a_rank_that_ignores_sigterm_is_killed(marker):
    code = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready")
if os.environ["ROUNDEL_RANK"] == "0": time.sleep(0.5); sys.exit(4)
time.sleep(100)
"""
    start = time.monotonic()
    job = roundelrun("-np", 2, "--grace", 0.2, *python(code, marker))
    assert job.returncode == 4
    assert 2 < time.monotonic() - start < 20
    assert "rank 1" in job.stderr.decode() and "launcher with SIGKILL" in job.stderr.decode()
    assert alive(marker) == []


DAEMON = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGHUP, signal.SIG_IGN)
sleeper = [sys.executable, "-S", "-c", "import time; time.sleep(100)", sys.argv[1]]
subprocess.Popen(sleeper)                                       # in the rank's group
subprocess.Popen(sleeper, start_new_session=True)               # in a session of its own
if os.fork() == 0:                                              # an orphan in a session of its own
    os.setsid()
    subprocess.Popen(sleeper)
    os._exit(0)
print("ready")
sys.stdout.flush()
"""


def test_children_left_behind_are_killed_at_the_end(marker):
    job = roundelrun("-np", 2, *python(DAEMON + "os._exit(0)", marker))
    assert (job.returncode, job.stderr) == (0, b"")
    assert alive(marker) == []


def test_helpers_get_a_moment_to_clean_up_after_their_rank(tmp_path):
    """multiprocessing's resource tracker does this: it waits for the end of a pipe, then unlinks what was leaked."""
    code = """
import os, sys, time
read, write = os.pipe()
if os.fork() == 0:
    os.close(write); os.read(read, 1); time.sleep(0.1); open(sys.argv[1], "w"); os._exit(0)
os._exit(0)
"""
    assert roundelrun("-np", 1, *python(code, str(tmp_path / "cleaned"))).returncode == 0
    assert (tmp_path / "cleaned").exists()


# -- signals


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_are_forwarded(signum, code, marker):
    rank = """
import os, signal, sys, time
def handler(signum, frame): print("got", signum); sys.exit(0)
for s in (1, 2, 15): signal.signal(s, handler)
print("ready")
time.sleep(100)
"""
    with running("-np", 2, *python(rank, marker), ready=2) as job:
        job.send_signal(signum)
        out, err = job.communicate(timeout=TIMEOUT)
        assert job.returncode == code
        assert sorted(out.splitlines()) == [b"[%d]<stdout>: got %d" % (r, signum) for r in range(2)]
        assert err == b"roundelrun: stopped by %s\n" % signal.Signals(signum).name.encode()
    assert alive(marker) == []


STUBBORN = """
import signal, time
for s in (2, 15): signal.signal(s, signal.SIG_IGN)
print("ready")
time.sleep(100)
"""


def test_after_ctrl_c_and_grace_comes_sigkill(marker):
    with running("-np", 2, "--grace", 0.5, *python(STUBBORN, marker), ready=2) as job:
        job.send_signal(signal.SIGINT)
        _, err = job.communicate(timeout=TIMEOUT)
        assert job.returncode == 130
        assert err == b"roundelrun: stopped by SIGINT; had to kill rank 0, 1\n"
    assert alive(marker) == []


def test_a_second_ctrl_c_kills_at_once(marker):
    with running("-np", 2, "--grace", 50, *python(STUBBORN, marker), ready=2) as job:
        job.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert job.poll() is None
        start = time.monotonic()
        job.send_signal(signal.SIGINT)
        assert job.wait(timeout=TIMEOUT) == 130
        assert time.monotonic() - start < 10
    assert alive(marker) == []


def test_ctrl_c_works_while_nobody_reads_the_output(marker):
    code = "import os\nwhile True: os.write(1, b'x' * 1000 + b'\\n')"
    with running("-np", 2, "--grace", 0.5, *python(code, marker), ready=2) as job:
        time.sleep(1)  # by now every buffer on the way is full
        job.send_signal(signal.SIGINT)
        assert job.wait(timeout=20) == 130
    assert alive(marker) == []


# -- kill -9


def test_kill_9_of_the_launcher_leaves_nothing(marker):
    with running("-np", 2, *python(DAEMON + "time.sleep(100)", marker), ready=2) as job:
        wait_until(lambda: len(alive(marker)) == 1 + 2 + 2 * 3)  # the launcher names the command too
        job.kill()
        job.wait()
        wait_until(lambda: not alive(marker), 2)


def test_kill_9_of_the_guard_leaves_nothing(marker):
    with running("-np", 2, *python(DAEMON + "time.sleep(100)", marker), ready=2) as job:
        guards = [pid for pid in children(job.pid) if b"guard.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert len(guards) == 1
        os.kill(guards[0], signal.SIGKILL)
        _, err = job.communicate(timeout=TIMEOUT)
        assert job.returncode == 1 and b"guard process" in err
    assert alive(marker) == []


def test_kill_9_of_launcher_and_guard_at_once_ends_the_ranks(marker):
    """PDEATHSIG's part. What ranks have started is out of reach then."""
    with running("-np", 2, *python("import time; print('ready'); time.sleep(100)", marker), ready=2) as job:
        for pid in [*children(job.pid), job.pid]:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not alive(marker), 2)


def test_kill_9_of_the_launchers_process_group_and_a_stopped_rank(marker):
    code = DAEMON + "os.kill(os.getpid(), signal.SIGSTOP)"
    with running("-np", 2, *python(code, marker), ready=2, start_new_session=True) as job:
        wait_until(lambda: len(alive(marker)) == 1 + 2 + 2 * 3)
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
        wait_until(lambda: not alive(marker), 2)


def children(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if int((entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[1]) == pid:
                    found.append(int(entry.name))
    return found


# -- roundel info


def test_roundel_info_prints_what_the_core_says(monkeypatch, capsys):
    import roundel
    from roundel import cli

    class Core:
        @staticmethod
        def info(mpi_places=()):
            return {"isa": "portable", "transports": "shm, tcp"}

    monkeypatch.setattr(roundel, "_core", Core, raising=False)
    assert cli.main(["info"]) == 0
    assert capsys.readouterr().out.endswith("isa         portable\ntransports  shm, tcp\n")
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out).items() >= Core.info().items()
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out.startswith("roundel ")
