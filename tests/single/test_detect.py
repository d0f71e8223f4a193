"""detect(): who started us and which rank we are, or a clear word about what is wrong with the variables."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys

import pytest
from roundel.launch import Launch, LaunchError
from roundel.launch import detect as module
from roundel.launch.detect import detect
from roundel.launch.variables import host_and_port

TOKEN = bytes(range(200, 232))


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch):
    """As if no detect() had happened yet."""
    monkeypatch.setattr(module, "_launches", 0)
    monkeypatch.setattr(module, "_stores", {})
    monkeypatch.setattr(module, "_listener", None)
    yield
    if module._listener is not None:
        module._listener.close()


@pytest.fixture
def token_fd():
    fd = os.memfd_create("token")
    os.write(fd, TOKEN)
    os.set_inheritable(fd, True)
    yield fd
    os.close(fd)


@pytest.fixture
def ours(token_fd):
    """What a script would set for rank 1 of 3."""
    return {
        "ROUNDEL_RANK": "1",
        "ROUNDEL_SIZE": "3",
        "ROUNDEL_RENDEZVOUS": "10.0.0.1:4000",
        "ROUNDEL_TOKEN_FD": str(token_fd),
    }


@pytest.fixture
def token_file(tmp_path):
    """Makes a file as only its owner may read it; returns what to set."""

    def make(content: bytes, mode: int = 0o600) -> dict[str, str]:
        path = tmp_path / "token"
        path.write_bytes(content)
        path.chmod(mode)
        return {"ROUNDEL_TOKEN_FILE": str(path)}

    return make


# -- none


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"HOME": "/", "ROUNDEL_TIMEOUT": "3", "ROUNDEL_TOKEN_FILE": "/nowhere"},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"LOCAL_RANK": "0"},
        {"WORLD_SIZE": "4", "MASTER_ADDR": "host", "MASTER_PORT": "1"},
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
        {"HOROVOD_RANK": "0", "HOROVOD_SIZE": "4"},  # a program that a rank of roundelrun's has started
    ],
)
def test_a_process_that_nobody_launched(environ):
    assert detect(environ) is None


@pytest.mark.parametrize(
    ("environ", "launcher"),
    [
        ({"HOROVOD_RANK": "0", "HOROVOD_SIZE": "4", "HOROVOD_GLOO_RENDEZVOUS_ADDR": "10.0.0.1"}, "horovodrun"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "n1", "SLURM_STEP_NUM_TASKS": "4"}, "srun"),
    ],
)
def test_ranks_of_launchers_that_are_not_followed_are_not_left_alone(environ, launcher, ours):
    with pytest.raises(LaunchError, match=f"^{launcher} has started this process .*=4 are set.*roundelrun"):
        detect(environ)
    assert detect(environ | ours).rank == 1


# -- ours


def test_our_variables(ours, token_fd):
    expected = Launch("roundel", 1, 3, None, None, "10.0.0.1:4000", None, TOKEN, 1)
    assert detect(ours) == expected
    assert not os.get_inheritable(token_fd)
    local = ours | {"ROUNDEL_LOCAL_RANK": "0", "ROUNDEL_LOCAL_SIZE": "2"}
    assert detect(local) == dataclasses.replace(expected, local_rank=0, local_size=2, epoch=2)


def test_each_init_is_a_new_epoch_and_a_failed_one_does_not_count(ours):
    assert detect({}) is None
    assert [detect(ours).epoch, detect(ours).epoch] == [1, 2]
    with pytest.raises(LaunchError):
        detect(ours | {"ROUNDEL_RANK": "x"})
    assert detect(ours).epoch == 3


def test_ours_come_before_torchruns(ours):
    assert detect(ours | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}).rank == 1


def test_rank_0_gets_the_launchers_listening_socket_each_time(ours):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        fd = listener.fileno()
        os.set_inheritable(fd, True)
        environ = ours | {"ROUNDEL_RANK": "0", "ROUNDEL_RENDEZVOUS_FD": str(fd)}
        assert [detect(environ).rendezvous_fd, detect(environ).rendezvous_fd] == [fd, fd]
        assert not os.get_inheritable(fd)
    assert detect(ours | {"ROUNDEL_RANK": "0"}).rendezvous_fd is None


def test_a_descriptor_that_is_no_listening_socket_is_refused(ours, token_fd):
    with socket.socket() as idle, socket.create_server(("127.0.0.1", 0)) as closed:
        for fd in (idle.fileno(), token_fd, os.dup(closed.detach())):
            if fd not in (idle.fileno(), token_fd):
                os.close(fd)
            with pytest.raises(LaunchError, match=f"ROUNDEL_RENDEZVOUS_FD={fd} should be a listening socket"):
                detect(ours | {"ROUNDEL_RANK": "0", "ROUNDEL_RENDEZVOUS_FD": str(fd)})


def test_the_token_is_not_shown(ours):
    launch = detect(ours)
    assert launch.token == TOKEN
    assert repr(TOKEN)[2:-1] not in repr(launch) and TOKEN.hex() not in repr(launch)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ROUNDEL_SIZE": None}, "ROUNDEL_SIZE must be set .*ROUNDEL_RANK=1"),
        ({"ROUNDEL_RANK": None}, "ROUNDEL_RANK must be set"),
        ({"ROUNDEL_RENDEZVOUS": None}, "ROUNDEL_RENDEZVOUS must be set"),
        ({"ROUNDEL_TOKEN_FD": None}, "ROUNDEL_TOKEN_FD or ROUNDEL_TOKEN_FILE must be set"),
        ({"ROUNDEL_RANK": "3"}, "ROUNDEL_RANK=3 must be below ROUNDEL_SIZE=3"),
        ({"ROUNDEL_RANK": "-1"}, "ROUNDEL_RANK must be a whole number, not '-1'"),
        ({"ROUNDEL_RANK": "one"}, "ROUNDEL_RANK must be a whole number, not 'one'"),
        ({"ROUNDEL_SIZE": "3.0"}, "ROUNDEL_SIZE must be a whole number, not '3.0'"),
        ({"ROUNDEL_SIZE": "\N{SUPERSCRIPT THREE}"}, "ROUNDEL_SIZE must be a whole number"),
        ({"ROUNDEL_SIZE": ""}, "ROUNDEL_SIZE must be set"),
        ({"ROUNDEL_LOCAL_RANK": "0"}, "ROUNDEL_LOCAL_SIZE must be set"),
        ({"ROUNDEL_LOCAL_SIZE": "2"}, "ROUNDEL_LOCAL_RANK must be set"),
        ({"ROUNDEL_LOCAL_RANK": "2", "ROUNDEL_LOCAL_SIZE": "2"}, "ROUNDEL_LOCAL_RANK=2 must be below"),
        ({"ROUNDEL_LOCAL_RANK": "2", "ROUNDEL_LOCAL_SIZE": "4"}, "is more than ROUNDEL_SIZE=3"),
        ({"ROUNDEL_RENDEZVOUS": "10.0.0.1"}, "must be host:port"),
        ({"ROUNDEL_TOKEN_FD": "987"}, "ROUNDEL_TOKEN_FD=987 should be a descriptor inherited"),
        ({"ROUNDEL_TOKEN_FD": "fd"}, "ROUNDEL_TOKEN_FD must be a whole number"),
    ],
)
def test_half_set_and_contradicting_variables_are_explained(ours, change, words):
    environ = {name: value for name, value in (ours | change).items() if value is not None}
    with pytest.raises(LaunchError, match=words) as caught:
        detect(environ)
    assert isinstance(caught.value, ValueError)
    assert "roundelrun -np N" in str(caught.value)


@pytest.mark.parametrize("text", ["host:1", "127.0.0.1:65535", "[fe80::1]:80"])
def test_host_and_port(text):
    assert host_and_port({"X": text}, "X") == text


@pytest.mark.parametrize("text", ["", "host", "host:", ":80", "host:0", "host:65536", "host:x", "fe80::1:80", "[]:80", "h:-1"])
def test_wrong_host_and_port(text):
    with pytest.raises(LaunchError, match="X"):
        host_and_port({"X": text}, "X")


# -- the token


@pytest.mark.parametrize("length", [0, 31, 33])
def test_a_token_descriptor_of_another_length(ours, length):
    fd = os.memfd_create("token")
    os.write(fd, b"x" * length)
    try:
        with pytest.raises(LaunchError, match="exactly 32 bytes"):
            detect(ours | {"ROUNDEL_TOKEN_FD": str(fd)})
    finally:
        os.close(fd)


@pytest.mark.parametrize("content", [TOKEN, TOKEN.hex().encode(), TOKEN.hex().upper().encode() + b"\n"])
@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_token_file(ours, token_file, content, mode):
    del ours["ROUNDEL_TOKEN_FD"]
    assert detect(ours | token_file(content, mode)).token == TOKEN


@pytest.mark.parametrize(
    "content", [b"", TOKEN[:-1], TOKEN + b"\n", b"g" * 64, b"a" * 64 + b"\n\n", b"a" * 66, b" " + b"a" * 63, b"a" * 63]
)
def test_a_token_file_with_other_content(ours, token_file, content):
    del ours["ROUNDEL_TOKEN_FD"]
    with pytest.raises(LaunchError, match="exactly 32 bytes, or 64 hexadecimal digits"):
        detect(ours | token_file(content))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o602, 0o610])
def test_a_token_file_that_is_open_to_others(ours, token_file, mode):
    del ours["ROUNDEL_TOKEN_FD"]
    with pytest.raises(LaunchError, match=f"open to others .mode {mode:04o}.: chmod 600"):
        detect(ours | token_file(TOKEN, mode))


def test_a_token_file_that_is_no_file(ours, tmp_path):
    del ours["ROUNDEL_TOKEN_FD"]
    os.mkfifo(tmp_path / "fifo", 0o600)
    for path, words in (
        (tmp_path / "fifo", "regular file"),
        (tmp_path, "regular file"),
        (tmp_path / "x", "No such file"),
    ):
        with pytest.raises(LaunchError, match=words):
            detect(ours | {"ROUNDEL_TOKEN_FILE": str(path)})


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_token_file_of_another_user(ours, token_file):
    del ours["ROUNDEL_TOKEN_FD"]
    environ = ours | token_file(TOKEN)
    os.chown(environ["ROUNDEL_TOKEN_FILE"], 12345, -1)
    with pytest.raises(LaunchError, match="must belong to user 0, not 12345"):
        detect(environ)


# -- torchrun: the agreement, with a dictionary as the store


class Store:
    """As much of TCPStore as detect() uses; what is not there times out at once."""

    def __init__(self):
        self.content = {}

    def set(self, key, value):
        self.content[key] = value

    def get(self, key):
        if key not in self.content:
            raise RuntimeError("wait timeout")
        return self.content[key].encode()


@pytest.fixture
def store(monkeypatch):
    store = Store()
    monkeypatch.setattr(module, "_store", lambda *_: store)
    return store


def torchrun(rank: int = 0, **more: str) -> dict[str, str]:
    return {
        "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",
        "TORCHELASTIC_RUN_ID": "run7", "TORCHELASTIC_RESTART_COUNT": "2",
    } | more  # fmt: skip


def test_torchruns_ranks_agree_through_the_store(store, monkeypatch):
    first = detect(torchrun(0))
    assert list(store.content) == ["roundel/run7/2/1"]
    monkeypatch.setattr(module, "_launches", 0)  # rank 1 is a process of its own
    second = detect(torchrun(1))
    assert (first.launcher, first.rank, first.size, first.local_rank, first.local_size, first.epoch) == (
        "torchrun", 0, 2, 0, 2, 1,
    )  # fmt: skip
    assert second == dataclasses.replace(first, rank=1, local_rank=1, rendezvous_fd=None)
    assert len(first.token) == 32 and len(set(first.token)) > 8
    host, _, port = first.rendezvous.rpartition(":")
    with socket.socket(fileno=os.dup(first.rendezvous_fd)) as listener, socket.create_connection((host, int(port))):
        assert listener.getsockname() == ("127.0.0.1", int(port))
        listener.accept()[0].close()


def test_a_second_init_under_torchrun_meets_elsewhere(store):
    first, second = detect(torchrun(0)), detect(torchrun(0))
    assert list(store.content) == ["roundel/run7/2/1", "roundel/run7/2/2"]
    assert (first.epoch, second.epoch) == (1, 2)
    assert first.token != second.token
    assert first.rendezvous_fd == second.rendezvous_fd or first.rendezvous != second.rendezvous


def test_what_an_earlier_attempt_published_is_not_taken(store):
    detect(torchrun(0, TORCHELASTIC_RESTART_COUNT="1"))
    with pytest.raises(TimeoutError, match="rank 1: rank 0 has not published where to meet within 5 s"):
        detect(torchrun(1, ROUNDEL_START_TIMEOUT="5"))


def test_a_token_file_keeps_the_token_out_of_the_store(store, token_file, monkeypatch):
    environ = token_file(TOKEN)
    first = detect(torchrun(0, **environ))
    assert first.token == TOKEN
    assert list(store.content.values()) == [first.rendezvous]
    monkeypatch.setattr(module, "_launches", 0)
    assert detect(torchrun(1, **environ)).token == TOKEN
    monkeypatch.setattr(module, "_launches", 0)
    with pytest.raises(LaunchError, match="on every rank or on none"):
        detect(torchrun(1))


def test_a_loopback_master_is_refused_for_several_hosts(store):
    with pytest.raises(LaunchError, match=r"loopback address .* other hosts cannot reach"):
        detect(torchrun(0, WORLD_SIZE="4"))
    assert store.content == {}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"LOCAL_RANK": None}, "LOCAL_RANK is not"),
        ({"RANK": None}, "RANK must be set"),
        ({"WORLD_SIZE": None}, "WORLD_SIZE must be set"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR must be set"),
        ({"MASTER_PORT": None}, "MASTER_PORT must be set"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT must be between"),
        ({"RANK": "2"}, "RANK=2 must be below WORLD_SIZE=2"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2 must be below LOCAL_WORLD_SIZE=2"),
        ({"ROUNDEL_START_TIMEOUT": "soon"}, "ROUNDEL_START_TIMEOUT must be a number of seconds"),
        ({"HOROVOD_START_TIMEOUT": "late"}, "HOROVOD_START_TIMEOUT must be a number of seconds"),
    ],
)
def test_half_set_torchrun_variables_are_explained(store, change, words):
    environ = {name: value for name, value in (torchrun(0) | change).items() if value is not None}
    with pytest.raises(LaunchError, match=words):
        detect(environ)


# -- torchrun itself

REPORT = """
import hashlib, json, os, sys
from roundel.launch.detect import detect
for init in range(2):
    found = detect()
    report = {name: getattr(found, name) for name in
              ("launcher", "rank", "size", "local_rank", "local_size", "rendezvous", "epoch")}
    report["token"] = hashlib.sha256(found.token).hexdigest()
    report["fd"] = found.rendezvous_fd is not None
    report["length"] = len(found.token)
    with open(os.path.join(sys.argv[1], f"{found.rank}.{init}"), "w") as f: json.dump(report, f)
if len(sys.argv) > 2:  # torch.distributed finds its store where ours was
    import torch, torch.distributed as dist
    dist.init_process_group("gloo")
    x = torch.ones(1); dist.all_reduce(x)
    assert x.item() == 2
    dist.destroy_process_group()
"""


def clean_environment() -> dict[str, str]:
    dirty = ("ROUNDEL_", "TORCHELASTIC_", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_")
    return {k: v for k, v in os.environ.items() if not k.startswith(dirty)} | {"OMP_NUM_THREADS": "1"}


def check_reports(directory) -> None:
    reports = {path.name: json.loads(path.read_text()) for path in directory.iterdir() if path.name[0] in "01"}
    assert sorted(reports) == ["0.0", "0.1", "1.0", "1.1"]
    for init in range(2):
        zero, one = reports[f"0.{init}"], reports[f"1.{init}"]
        assert zero["fd"] and not one["fd"]
        assert zero["length"] == 32 and zero["epoch"] == init + 1
        assert zero["launcher"] == "torchrun" and zero["rendezvous"].startswith("127.0.0.1:")
        assert (zero["rank"], zero["size"], one["rank"], one["local_rank"]) == (0, 2, 1, 1)
        for same in ("token", "rendezvous", "epoch", "length", "local_size"):
            assert zero[same] == one[same]
    assert reports["0.0"]["token"] != reports["0.1"]["token"]


def test_under_torchrun(tmp_path):
    pytest.importorskip("torch")
    script = tmp_path / "script.py"
    script.write_text(REPORT)
    job = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1",
         "--master-port", str(free_port()), str(script), str(tmp_path)],
        env=clean_environment(), capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert job.returncode == 0, job.stderr
    check_reports(tmp_path)


def test_torchruns_variables_set_by_hand(tmp_path):
    pytest.importorskip("torch")
    port = str(free_port())
    jobs = []
    for rank in ("1", "0"):  # rank 0 hosts the store and comes last: the other waits for it
        more = {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        arguments = [sys.executable, "-c", REPORT, str(tmp_path), "and torch.distributed"]
        jobs.append(subprocess.Popen(arguments, env=clean_environment() | more, stderr=subprocess.PIPE, text=True))
    try:
        errors = [job.communicate(timeout=180)[1] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert [job.returncode for job in jobs] == [0, 0], errors
    check_reports(tmp_path)


def test_a_store_that_nobody_hosts_is_a_connection_error():
    pytest.importorskip("torch")
    environ = torchrun(1, MASTER_PORT=str(free_port()), ROUNDEL_START_TIMEOUT="1")
    with pytest.raises(ConnectionError, match="rank 1 does not reach the store at MASTER_ADDR:MASTER_PORT"):
        detect(environ)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]
