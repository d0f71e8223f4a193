"""horovodrun's command line under roundelrun: every flag is taken, noted or refused, and none is lost."""

from __future__ import annotations

import re
import socket

import pytest
from roundel import _core
from roundel.launch import horovodrun
from roundel.launch.config import KEYS, ConfigError, flags_of
from roundel.launch.horovodrun import FLAGS, Kind
from roundel.launch.hosts import HostsError, check_hosts, hosts_of_file, hosts_of_list
from roundel.launch.options import make_parser, parse
from test_launch import lines_of, python, roundelrun

# `horovodrun --help` of 0.28.1, and what it does not show there.
HELP = """
    -h --help -v --version -np --num-proc -cb --check-build --disable-cache --start-timeout --network-interfaces
    --network-interface --output-filename --verbose --config-file -p --ssh-port -i --ssh-identity-file --fusion-threshold-mb
    --cycle-time-ms --cache-capacity --hierarchical-allreduce --no-hierarchical-allreduce --hierarchical-allgather
    --no-hierarchical-allgather --autotune --no-autotune --autotune-log-file --autotune-warmup-samples
    --autotune-steps-per-sample --autotune-bayes-opt-max-samples --autotune-gaussian-process-noise --min-np --min-num-proc
    --max-np --max-num-proc --slots-per-host --elastic-timeout --reset-limit --blacklist-cooldown-range --timeline-filename
    --timeline-mark-cycles --no-timeline-mark-cycles --no-stall-check --stall-check --stall-check-warning-time-seconds
    --stall-check-shutdown-time-seconds --mpi-threads-disable --no-mpi-threads-disable --mpi-args --tcp --binding-args
    --num-nccl-streams --thread-affinity --gloo-timeout-seconds --log-level --log-with-timestamp --log-without-timestamp
    -prefix-timestamp --prefix-output-with-timestamp --log-hide-timestamp --no-log-hide-timestamp -H --hosts -hostfile
    --hostfile --host-discovery-script --gloo --mpi --jsrun
"""
HOROVODRUN = set(HELP.split())


def refusal(capsys, *arguments: str) -> str:
    """What parse() says to a command line that it refuses."""
    with pytest.raises(SystemExit) as ended:
        parse([*arguments, "true"])
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1].removeprefix("roundelrun: error: ")


def env_of(*arguments: str) -> dict[str, str]:
    return parse(["-np", "2", *arguments, "true"]).env


# -- the table


def test_every_flag_of_horovodruns_has_a_row_and_a_place_in_the_parser():
    rows = [name for flag in FLAGS for name in flag.names + flag.off]
    assert len(rows) == len(set(rows))
    assert set(rows) | {"-h", "--help"} == HOROVODRUN
    parser = make_parser()
    assert {name for action in parser._actions for name in action.option_strings} >= HOROVODRUN


def test_settings_are_those_of_the_core():
    known = {name for name, *_ in _core.settings()}
    assert {flag.variable for flag in FLAGS if flag.kind is Kind.SETTING} <= known


@pytest.mark.parametrize(
    ("arguments", "variables"),
    [
        ("--fusion-threshold-mb 32", {"ROUNDEL_FUSION_THRESHOLD": "32M"}),
        ("--fusion-threshold-mb 0", {"ROUNDEL_FUSION_THRESHOLD": "0M"}),
        ("--timeline-filename /tmp/run.json", {"ROUNDEL_TIMELINE": "/tmp/run"}),
        ("--timeline-filename /tmp/run --timeline-mark-cycles",
         {"ROUNDEL_TIMELINE": "/tmp/run", "ROUNDEL_TIMELINE_MARK_CYCLES": "1"}),
        ("--timeline-mark-cycles --no-timeline-mark-cycles", {}),
        ("--stall-check-warning-time-seconds 15", {"ROUNDEL_STALL_CHECK_SECONDS": "15"}),
        ("--no-stall-check --stall-check-warning-time-seconds 15", {"ROUNDEL_STALL_CHECK_SECONDS": "0"}),
        ("--stall-check", {}),
        ("--stall-check-shutdown-time-seconds 90", {"ROUNDEL_STALL_SHUTDOWN_SECONDS": "90"}),
        ("--gloo-timeout-seconds 45", {"ROUNDEL_TIMEOUT": "45"}),
        ("--gloo-timeout-seconds 45 --timeout 2.5", {"ROUNDEL_TIMEOUT": "2.5"}),
        ("--log-level TRACE", {"ROUNDEL_LOG_LEVEL": "debug"}),
        ("--log-level FATAL", {"ROUNDEL_LOG_LEVEL": "error"}),
        ("--log-level warning", {"ROUNDEL_LOG_LEVEL": "warning"}),
        ("--network-interface eth1", {"ROUNDEL_INTERFACE": "eth1"}),
        ("--network-interfaces eth1,eth2", {"ROUNDEL_INTERFACE": "eth1"}),
        ("--start-timeout 20", {"ROUNDEL_START_TIMEOUT": "20"}),
        ("--verbose -H localhost:2 --no-autotune -p 22 --mpi-args=--map-by", {}),
    ],
)  # fmt: skip
def test_flags_become_settings(arguments, variables):
    plain = env_of()
    assert env_of(*arguments.split()) == plain | variables
    assert not {name for name in plain if name in {flag.variable for flag in FLAGS}}


@pytest.mark.parametrize("flag", [f for f in FLAGS if f.kind is Kind.IGNORED], ids=lambda f: f.names[-1])
def test_flags_without_effect_are_noted(flag):
    for name in flag.names:
        options = parse(["-np", "1", name, *(["7"] if flag.takes else []), "true"])
        assert options.command == ["true"]
        assert options.notes == [f"note: {flag.names[-1]} has no effect: {flag.does}"]


@pytest.mark.parametrize("flag", [f for f in FLAGS if f.kind is Kind.REFUSED], ids=lambda f: f.names[-1])
def test_refused_flags_say_why(flag, capsys):
    for name in flag.names:
        assert refusal(capsys, "-np", "1", name, *(["7"] if flag.takes else [])) == f"{name}: {flag.does}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--fusion-threshold", "3"], "unknown option --fusion-threshold; did you mean --fusion-threshold-mb?"),
        (["--nonsense=3"], "unknown option --nonsense ("),
        (["-x"], "unknown option -x"),
        (["--fusion-threshold-mb", "-1"], "--fusion-threshold-mb"),
        (["--fusion-threshold-mb", "3.5"], "'3.5' is not a whole number"),
        (["--log-level", "LOUD"], "'LOUD' is none of TRACE, DEBUG"),
        (["-H", "localhost:2", "--hostfile", "x"], "not allowed with"),
        (["--output-filename", "a", "--output-dir", "b"], "not allowed with"),
        (["--no-prefix", "-prefix-timestamp"], "contradict"),
    ],
)
def test_what_is_no_flag_or_no_value_is_an_error(arguments, words, capsys):
    assert words in refusal(capsys, "-np", "2", *arguments)


def test_notes_are_shown_and_the_job_runs():
    job = roundelrun("-np", 2, "--cycle-time-ms", 3.5, "--gloo", "echo", "ran")
    assert job.returncode == 0 and job.stdout.count(b"ran") == 2
    said = job.stderr.decode().splitlines()
    assert [line.split(":")[:2] for line in said] == [["roundelrun", " note"]] * 2
    assert "there is no cycle" in said[0] and "--gloo" in said[1]


# -- --config-file

DOCUMENTED = """
---
controller: gloo   # a comment
params:
    fusion_threshold_mb: 32
    cycle_time_ms: 3.5
    cache_capacity: 2048
    hierarchical_allreduce: True
    hierarchical_allgather: false
autotune:
    enabled: True
    log_file: "horovod # autotune.log"
    warmup_samples: 5
timeline:
    filename: '/tmp/timeline.json'
    mark_cycles: yes
stall_check:
    enabled: True
    warning_time_seconds: 120

    shutdown_time_seconds: 240
library_options:
    mpi_threads_disable: True
    num_nccl_streams: ~
logging:
  level: INFO
  hide_timestamp: True
"""


def test_the_config_file_stands_for_flags():
    assert flags_of(DOCUMENTED) == [
        "--gloo",
        "--fusion-threshold-mb=32",
        "--cycle-time-ms=3.5",
        "--cache-capacity=2048",
        "--hierarchical-allreduce",
        "--no-hierarchical-allgather",
        "--autotune",
        "--autotune-log-file=horovod # autotune.log",
        "--autotune-warmup-samples=5",
        "--timeline-filename=/tmp/timeline.json",
        "--timeline-mark-cycles",
        "--stall-check",
        "--stall-check-warning-time-seconds=120",
        "--stall-check-shutdown-time-seconds=240",
        "--mpi-threads-disable",
        "--log-level=INFO",
        "--log-hide-timestamp",
    ]


def test_its_keys_are_flags():
    known = {name for flag in FLAGS for name in flag.names + flag.off}
    for flag in KEYS.values():
        assert known.issuperset([flag] if isinstance(flag, str) else flag)


def test_the_command_line_goes_before_the_config_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(DOCUMENTED)
    env = env_of("--fusion-threshold-mb", "8", "--config-file", str(path), "--log-level", "ERROR")
    assert env["ROUNDEL_FUSION_THRESHOLD"] == "8M" and env["ROUNDEL_LOG_LEVEL"] == "error"
    assert env["ROUNDEL_TIMELINE"] == "/tmp/timeline" and env["ROUNDEL_STALL_SHUTDOWN_SECONDS"] == "240"
    path.write_text("stall_check:\n  enabled: no\n")
    assert env_of("--config-file", str(path))["ROUNDEL_STALL_CHECK_SECONDS"] == "0"
    assert "ROUNDEL_STALL_CHECK_SECONDS" not in env_of("--config-file", str(path), "--stall-check")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("params:\n  fusion_threshold: 3\n", "line 2: params.fusion_threshold is no key"),
        ("fusion_threshold_mb: 3\n", "line 1: fusion_threshold_mb is no key"),
        ("parms:\n  fusion_threshold_mb: 3\n", "line 1: parms is no section"),
        ("  fusion_threshold_mb: 3\n", "line 1: fusion_threshold_mb is indented"),
        ("controller: ring\n", "line 1: controller: expected gloo or mpi, got 'ring'"),
        ("autotune:\n  enabled: perhaps\n", "line 2: autotune.enabled: expected true or false, got 'perhaps'"),
        ("- params\n", "line 1: expected 'key: value', got '- params'"),
        ("params: {fusion_threshold_mb: 3}\n", "line 1: {fusion_threshold_mb: 3} is not understood"),
        ('timeline:\n  filename: "a\\tb"\n', "line 2: "),
        ("params:\n\tfusion_threshold_mb: 3\n", "line 2: expected 'key: value'"),
        ("params:fusion\n", "line 1: expected 'key: value'"),
    ],
)
def test_what_is_not_understood_of_a_config_file_is_named_with_its_line(text, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        flags_of(text)


def test_a_config_file_that_cannot_be_used_is_named(tmp_path, capsys):
    path = tmp_path / "config.yaml"
    assert f"--config-file {path}: " in refusal(capsys, "-np", "1", "--config-file", str(path))
    path.write_text("params:\n  fusion_threshold_mb: many\n")
    said = refusal(capsys, "-np", "1", "--config-file", str(path))
    assert said == f"--config-file {path}: argument --fusion-threshold-mb: 'many' is not a whole number from 0 on"


# -- -H and --hostfile


def test_hosts_are_read():
    assert hosts_of_list("a:2, b.example:4,c") == [("a", 2), ("b.example", 4), ("c", 1)]
    assert hosts_of_list("[::1]:3") == [("::1", 3)]
    for wrong in ("", "a:two", "a:2,,b:1", "a:2:3", "a b:2"):
        with pytest.raises(HostsError, match="HOST:SLOTS"):
            hosts_of_list(wrong)


def test_hostfiles_are_read(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# all\nlocalhost slots=2\n\nb.example  slots = 4 # far\nc\n")
    assert hosts_of_file(str(path)) == [("localhost", 2), ("b.example", 4), ("c", 1)]
    for text, words in (("a slots=x", "line 1"), ("a b", "line 1"), ("# none", "names no host")):
        path.write_text(text)
        with pytest.raises(HostsError, match=words):
            hosts_of_file(str(path))
    with pytest.raises(HostsError, match="cannot be read"):
        hosts_of_file(str(tmp_path / "nowhere"))


def test_ranks_must_be_on_this_host():
    check_hosts([("localhost", 2)], 2)
    check_hosts([("127.0.0.1", 1), (socket.gethostname(), 3)], 4)
    check_hosts([("localhost", 2), ("far.invalid", 2)], 2)  # nobody is sent there
    with pytest.raises(HostsError, match=r"rank would be on far\.invalid\..*torchrun"):
        check_hosts([("localhost", 2), ("far.invalid", 2)], 3)
    with pytest.raises(HostsError, match="192.0.2.1"):  # an address for documentation, nobody's own
        check_hosts([("192.0.2.1", 2)], 2)
    with pytest.raises(HostsError, match="3 ranks are asked for, but the hosts have 2 slots"):
        check_hosts([("localhost", 2)], 3)


def test_hosts_on_the_command_line(tmp_path, capsys):
    path = tmp_path / "hosts"
    path.write_text("localhost slots=2\n")
    for arguments in (["-H", "localhost:2"], ["--hosts=localhost:2"], ["--hostfile", str(path)], ["-hostfile", str(path)]):
        job = roundelrun("-np", 2, *arguments, "echo", "ran")
        assert job.returncode == 0 and job.stdout.count(b"ran") == 2
    assert refusal(capsys, "-np", "2", "-H", "far.invalid:2").startswith("--hosts: ranks would be on far.invalid")
    assert refusal(capsys, "-np", "3", "--hostfile", str(path)).startswith("--hostfile: 3 ranks are asked for")


# -- what ranks get, and their output


def test_ranks_find_their_place_under_horovods_names():
    code = "import os; print(*(os.environ['HOROVOD_' + n] for n in"
    code += " ('RANK', 'SIZE', 'LOCAL_RANK', 'LOCAL_SIZE', 'CROSS_RANK', 'CROSS_SIZE', 'HOSTNAME')))"
    job = roundelrun("-np", 2, *python(code), HOROVOD_RANK="7", HOROVOD_SIZE="9")
    for rank in range(2):
        assert lines_of(job.stdout, rank) == [f"{rank} 2 {rank} 2 0 1 {socket.gethostname()}".encode()]


def test_output_filename_is_laid_out_as_horovods(tmp_path):
    code = "import os, sys; r = os.environ['ROUNDEL_RANK']; print('out', r); print('err', r, file=sys.stderr)"
    job = roundelrun("-np", 11, "--output-filename", tmp_path / "a", *python(code))
    assert job.returncode == 0 and len(job.stdout.splitlines()) == 11
    found = {str(path.relative_to(tmp_path / "a")): path.read_text() for path in (tmp_path / "a").glob("*/*")}
    expected = {f"rank.{r:02d}/stdout": f"out {r}\n" for r in range(11)} | {
        f"rank.{r:02d}/stderr": f"err {r}\n" for r in range(11)
    }
    assert found == expected


def test_the_time_before_each_line():
    job = roundelrun("-np", 1, "--prefix-output-with-timestamp", "printf", r"a\nb\n", LC_ALL="C")
    pattern = rb"\w{3} \w{3} [ \d]\d \d\d:\d\d:\d\d \d{4}\[0\]<stdout>: "
    assert re.fullmatch(pattern + b"a\n" + pattern + b"b\n", job.stdout), job.stdout


def test_check_build_prints_what_there_is_and_starts_nothing():
    job = roundelrun("--check-build")
    said = job.stdout.decode()
    assert (job.returncode, job.stderr) == (0, b"") and said.startswith("Roundel v")
    for line in ("Available Frameworks:", "    [X] NumPy and DLPack", "    [ ] MPI", "    [X] Shared memory"):
        assert line in said.splitlines()
    assert f"    isa: {_core.info()['isa']}" in said
    assert roundelrun("-np", 2, "-cb", "false").returncode == 0


def test_notes_name_each_flag_once():
    values = make_parser().parse_args(["--autotune", "--no-autotune", "--mpi"])
    assert [note.split()[1] for note in horovodrun.notes(values)] == ["--no-autotune", "--mpi"]
