"""horovodrun's --config-file: the keys that it documents, as the flags that they stand for.

The file is YAML of two levels, `key: value` and `section:` with indented `key: value` lines; that is read here, without a YAML
library, and anything else of YAML (lists, anchors, flow braces, several documents) is an error that names the line.
"""

from __future__ import annotations

import re

__all__ = ["KEYS", "ConfigError", "flags_of"]

# "section.key": the flag, or for a value that is true or false (the flag for true, the flag for false).
KEYS: dict[str, str | tuple[str, str]] = {
    "params.fusion_threshold_mb": "--fusion-threshold-mb",
    "params.cycle_time_ms": "--cycle-time-ms",
    "params.cache_capacity": "--cache-capacity",
    "params.hierarchical_allreduce": ("--hierarchical-allreduce", "--no-hierarchical-allreduce"),
    "params.hierarchical_allgather": ("--hierarchical-allgather", "--no-hierarchical-allgather"),
    "autotune.enabled": ("--autotune", "--no-autotune"),
    "autotune.log_file": "--autotune-log-file",
    "autotune.warmup_samples": "--autotune-warmup-samples",
    "autotune.steps_per_sample": "--autotune-steps-per-sample",
    "autotune.bayes_opt_max_samples": "--autotune-bayes-opt-max-samples",
    "autotune.gaussian_process_noise": "--autotune-gaussian-process-noise",
    "timeline.filename": "--timeline-filename",
    "timeline.mark_cycles": ("--timeline-mark-cycles", "--no-timeline-mark-cycles"),
    "stall_check.enabled": ("--stall-check", "--no-stall-check"),
    "stall_check.warning_time_seconds": "--stall-check-warning-time-seconds",
    "stall_check.shutdown_time_seconds": "--stall-check-shutdown-time-seconds",
    "library_options.mpi_threads_disable": ("--mpi-threads-disable", "--no-mpi-threads-disable"),
    "library_options.num_nccl_streams": "--num-nccl-streams",
    "library_options.thread_affinity": "--thread-affinity",
    "library_options.gloo_timeout_seconds": "--gloo-timeout-seconds",
    "logging.level": "--log-level",
    "logging.with_timestamp": ("--log-with-timestamp", "--log-without-timestamp"),
    "logging.hide_timestamp": ("--log-hide-timestamp", "--no-log-hide-timestamp"),
}
CONTROLLERS = {"gloo": "--gloo", "mpi": "--mpi"}
SECTIONS = {key.partition(".")[0] for key in KEYS}
TRUE, FALSE = ("true", "yes", "on"), ("false", "no", "off")
LINE = re.compile(r"(?P<indent> *)(?P<key>[A-Za-z_]\w*)\s*:(?:\s+(?P<value>.*?))?\s*")


class ConfigError(ValueError):
    """The file cannot be used: which line, and why."""


def flags_of(text: str) -> list[str]:
    """The command line that the file stands for. Raises ConfigError."""
    flags: list[str] = []
    for number, key, value in entries(text):
        where = f"line {number}: {key}"
        if key == "controller":
            if value.lower() not in CONTROLLERS:
                raise ConfigError(f"{where}: expected gloo or mpi, got {value!r}")
            flags.append(CONTROLLERS[value.lower()])
        elif key not in KEYS:
            raise ConfigError(f"{where} is no key of horovodrun's")
        elif isinstance(flag := KEYS[key], str):
            flags += [f"{flag}={value}"]
        elif value.lower() in TRUE + FALSE:
            flags.append(flag[value.lower() in FALSE])
        else:
            raise ConfigError(f"{where}: expected true or false, got {value!r}")
    return flags


def entries(text: str):
    """(line number, "section.key" or "key", value) of every line that has a value other than null."""
    section = ""
    for number, line in enumerate(text.splitlines(), 1):
        line = without_comment(line)
        if not line.strip() or (line.strip() == "---" and not section):
            continue
        found = LINE.fullmatch(line)
        if found is None:
            raise ConfigError(f"line {number}: expected 'key: value', got {line.strip()!r}")
        key, value = found["key"], unquoted(found["value"] or "", number)
        if not found["indent"]:
            section = key if not value else ""
            if section in SECTIONS:
                continue
        elif not section:
            raise ConfigError(f"line {number}: {key} is indented, but there is no section above it")
        else:
            key = f"{section}.{key}"
        if value and value not in ("null", "~"):
            yield number, key, value
        elif not found["indent"]:
            raise ConfigError(f"line {number}: {key} is no section of horovodrun's: {', '.join(sorted(SECTIONS))}")


def without_comment(line: str) -> str:
    """The line up to a '#' that starts a comment: at its beginning or after a blank, and not inside quotes."""
    quote = ""
    for i, c in enumerate(line):
        if quote:
            quote = "" if c == quote else quote
        elif c in "'\"" and line[:i].rstrip().endswith(":"):
            quote = c
        elif c == "#" and (i == 0 or line[i - 1] in " \t"):
            return line[:i]
    return line


def unquoted(value: str, number: int) -> str:
    if value[:1] in ("'", '"'):
        if len(value) < 2 or value[-1] != value[0] or value[0] in value[1:-1] or "\\" in value:
            raise ConfigError(f"line {number}: {value} is not understood: quotes inside quotes and escapes are not read")
        return value[1:-1]
    if value[:1] in tuple("[{&*!|>@`%"):
        raise ConfigError(f"line {number}: {value} is not understood: a plain value is expected")
    return value
