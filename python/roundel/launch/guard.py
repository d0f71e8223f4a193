"""The guard: a small process between the launcher and its ranks that starts them, ends them and leaves nothing behind.

    launcher  --(socket: SIGNAL and KILL orders, its end means 'the launcher is dead')-->  guard  --fork-->  ranks
    launcher  <--(socket: started + output pipes, ended, done)--                           guard

Why a process of its own: whoever does `kill -9` on the launcher must not leave ranks running, and a rank's own
children may have moved to a session of their own, where no process group finds them. The guard is their *subreaper*:
every orphan below it becomes its child, so a walk down from the guard finds all of them. The ranks in turn get SIGKILL
from the kernel when the guard dies (PDEATHSIG), and the launcher is a subreaper too and does the walk in that case.

Run as a script, `python -I -S guard.py CONFIG_FD`: nothing of the package is imported, so it starts fast, has one
thread (fork is safe, and PDEATHSIG follows the *thread* that forked) and its command line does not hold the job's, so
that `pkill -9 -f train.py` spares it. The launcher imports the helpers from here.

Deaths arrive as SIGCHLD in the event loop: a subreaper must reap adopted orphans too, and this is one path for both.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
TERM_SECONDS = 2.0  # between SIGTERM and SIGKILL, and after SIGKILL before a process counts as unkillable (D state)
LINGER_SECONDS = 0.5  # for a rank's helpers after its end: multiprocessing's resource tracker unlinks leaked shm then

_prctl = ctypes.CDLL(None, use_errno=True).prctl  # looked up before any fork: the child must not load libraries
_prctl.argtypes = [ctypes.c_int] + 4 * [ctypes.c_ulong]


def be_subreaper(on: bool = True) -> None:
    """Make orphans below this process its children instead of init's."""
    if _prctl(PR_SET_CHILD_SUBREAPER, int(on), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def descendants(root: int) -> list[int]:
    """All living processes below `root`, in any session or group. /proc/PID/task/*/children is not in every kernel."""
    children = collections.defaultdict(list)
    zombies = set()
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat", "rb") as f:
                    state, parent = f.read().rpartition(b")")[2].split()[:2]  # the name before ')' may hold anything
            except (OSError, ValueError):
                continue  # ended meanwhile
            children[int(parent)].append(int(entry))
            if state in (b"Z", b"X"):
                zombies.add(int(entry))
    found, queue = [], [root]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return [pid for pid in found if pid not in zombies]


def wait_for_any(pids: Iterable[int], seconds: float) -> None:
    """Return when one of the processes has ended, and reap those that are children of ours."""
    with selectors.DefaultSelector() as selector:
        fds = []
        try:
            for pid in pids:
                try:
                    fds.append(os.pidfd_open(pid))
                except ProcessLookupError:
                    seconds = 0  # gone already: look again at once
                except OSError:
                    break  # out of descriptors: waiting for some of them is enough
                else:
                    selector.register(fds[-1], selectors.EVENT_READ, pid)
            for key, _ in selector.select(max(0, seconds)):
                with contextlib.suppress(ChildProcessError):  # a grandchild: its parent reaps it, or leaves it to us
                    os.waitpid(key.data, os.WNOHANG)
        finally:
            for fd in fds:
                os.close(fd)


def end_tree(root: int, linger: float = 0.0, spare: frozenset[int] = frozenset()) -> list[int]:
    """End all that lives below `root`: after `linger` seconds by SIGKILL. Returns those that could not be killed."""
    start = time.monotonic()
    while left := [pid for pid in descendants(root) if pid not in spare]:
        now = time.monotonic() - start
        if now >= linger + TERM_SECONDS:
            return left
        if now < linger:
            wait_for_any(left, linger - now)
            continue
        for pid in left:
            send_signal(pid, signal.SIGKILL)
        wait_for_any(left, linger + TERM_SECONDS - now)
    return []


def send_signal(pid: int, signum: int, group: bool = False) -> None:
    """kill() or killpg() where 'gone meanwhile' and 'not ours' (a setuid program) are no errors."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        (os.killpg if group else os.kill)(pid, signum)


class Guard:
    """Owns the ranks. Single-threaded; those in `alive` have not been reaped, so their pids cannot be reused."""

    def __init__(self, config: dict) -> None:
        self.config = config
        self.control = socket.socket(fileno=config["control_fd"])
        self.alive: dict[int, int] = {}  # pid -> rank
        self.processes: list[subprocess.Popen] = []  # kept: a dropped Popen would reap behind our back
        self.sent: set[int] = set()  # signals that ranks got from us: the report tells them from those of others
        self.steps: collections.deque[tuple[float, int]] = collections.deque()  # what comes next: (seconds, signal)
        self.deadline: float | None = None

    def run(self) -> None:
        be_subreaper()
        wake = watch_signals()
        if self.start_ranks():
            with selectors.DefaultSelector() as selector:
                selector.register(self.control, selectors.EVENT_READ)
                selector.register(wake, selectors.EVENT_READ)
                self.reap()  # a rank may have ended before the selector was set up
                while self.alive and self.keep_time():
                    timeout = None if self.deadline is None else max(0.0, self.deadline - time.monotonic())
                    for key, _ in selector.select(timeout):
                        if key.fileobj is wake:
                            wake.recv(4096)
                            self.reap()
                        elif not self.obey():
                            selector.unregister(self.control)
        self.tell({"done": True, "left": end_tree(os.getpid(), LINGER_SECONDS)})

    # -- starting

    def start_ranks(self) -> bool:
        """Start every rank, or none: a command that cannot be started takes those before it along."""
        config = self.config
        parent = os.getpid()

        def die_with_guard() -> None:
            _prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != parent:  # the guard died before prctl: nobody would send the signal
                os._exit(128 + signal.SIGKILL)

        for rank in range(config["size"]):
            places = ("ROUNDEL_RANK", "ROUNDEL_LOCAL_RANK", "HOROVOD_RANK", "HOROVOD_LOCAL_RANK")
            env = os.environ | dict.fromkeys(places, str(rank))
            fds = [config["token_fd"]]
            if rank == 0:
                env["ROUNDEL_RENDEZVOUS_FD"] = str(config["rendezvous_fd"])
                fds.append(config["rendezvous_fd"])
            out, out_end = os.pipe()
            err, err_end = os.pipe()
            try:
                process = subprocess.Popen(
                    config["command"], env=env, stdin=None if rank == 0 else subprocess.DEVNULL, stdout=out_end,
                    stderr=err_end, pass_fds=fds, start_new_session=True, preexec_fn=die_with_guard,
                )  # fmt: skip
            except (OSError, ValueError, subprocess.SubprocessError) as error:
                self.tell({"failed": str(error), "errno": getattr(error, "errno", None)})
                self.signal_ranks(signal.SIGKILL)
                return False
            self.processes.append(process)
            self.alive[process.pid] = rank
            self.tell({"started": rank, "pid": process.pid}, [out, err])
            for fd in (out, out_end, err, err_end):
                os.close(fd)
        self.let_go()
        return True

    def let_go(self) -> None:
        """Keep nothing open but the socket: a closed stdout's reader or a dead rank 0's port must not wait for us."""
        os.close(self.config["token_fd"])
        os.close(self.config["rendezvous_fd"])
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.close(null)

    # -- watching

    def reap(self) -> None:
        """Take in all that have ended. Of ranks that ended at once, one that died by a signal is taken as the first."""
        ended = []
        try:
            while (found := os.waitpid(-1, os.WNOHANG))[0] != 0:
                if found[0] in self.alive:
                    ended.append((self.alive.pop(found[0]), os.waitstatus_to_exitcode(found[1])))
        except ChildProcessError:
            pass
        for rank, code in sorted(ended, key=lambda e: (e[1] >= 0, e[0])):
            self.tell({"ended": rank, "code": code, "by_us": -code in self.sent})
            if code != 0 and not self.steps and not self.sent:
                self.plan((self.config["grace"], signal.SIGTERM), (TERM_SECONDS, signal.SIGKILL))

    def obey(self) -> bool:
        """One order from the launcher; False when the launcher is gone."""
        try:
            order = self.control.recv(4096)
        except OSError:
            order = b""
        if not order:
            for pid in self.alive:  # not their groups: helpers get LINGER_SECONDS in end_tree()
                send_signal(pid, signal.SIGKILL)
            self.plan((TERM_SECONDS, 0))
            return False
        signum = json.loads(order)["signal"]
        self.signal_ranks(signum)
        self.plan((TERM_SECONDS, 0) if signum == signal.SIGKILL else (self.config["grace"], signal.SIGKILL))
        return True

    # -- ending

    def plan(self, *steps: tuple[float, int]) -> None:
        self.steps = collections.deque(steps)
        self.deadline = time.monotonic() + steps[0][0]

    def keep_time(self) -> bool:
        """Take the step that is due. False: ranks outlived SIGKILL (uninterruptible sleep) and are not waited for."""
        while self.deadline is not None and time.monotonic() >= self.deadline:
            signum = self.steps.popleft()[1]
            if signum == 0:
                return False
            self.signal_ranks(signum)
            if not self.steps:
                self.steps.append((TERM_SECONDS, 0))
            self.deadline = time.monotonic() + self.steps[0][0]
        return True

    def signal_ranks(self, signum: int) -> None:
        self.sent.add(signum)
        for pid in self.alive:
            send_signal(pid, signum, group=True)

    def tell(self, message: dict, fds: Iterable[int] = ()) -> None:
        with contextlib.suppress(OSError):  # the launcher is gone: obey() sees it
            socket.send_fds(self.control, [json.dumps(message).encode()], list(fds))


def watch_signals() -> socket.socket:
    """SIGCHLD wakes the loop; the signals that a terminal or `kill` sends to the whole job are the launcher's business.

    They get a handler instead of being ignored, because an ignored signal would stay ignored in the ranks after exec.
    """
    wake, notify = socket.socketpair()
    for end in (wake, notify):
        end.setblocking(False)
    signal.set_wakeup_fd(notify.detach(), warn_on_full_buffer=False)
    watched = (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    for signum in watched:
        signal.signal(signum, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, watched)
    return wake


if __name__ == "__main__":
    with open(int(sys.argv[1]), "rb") as config_file:
        Guard(json.load(config_file)).run()
