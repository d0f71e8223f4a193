"""Reading the environment variables that describe a job; what is wrong with them becomes a LaunchError."""

from __future__ import annotations

from collections.abc import Mapping

OURS = ("ROUNDEL_RANK", "ROUNDEL_SIZE", "ROUNDEL_LOCAL_RANK", "ROUNDEL_LOCAL_SIZE", "ROUNDEL_RENDEZVOUS",
        "ROUNDEL_RENDEZVOUS_FD", "ROUNDEL_TOKEN_FD")  # fmt: skip
HOW_TO_START = "Start a job with `roundelrun -np N python script.py` or `torchrun --nproc-per-node N script.py`"


class LaunchError(ValueError):
    """The variables that describe the job are incomplete or contradict each other; the text says which and how."""


def launch_error(what: str, environ: Mapping[str, str] | None = None) -> LaunchError:
    """`what`, then what came (with `environ`), then the way out."""
    names = (*OURS, "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    came = [f"{name}={environ[name]}" for name in names if name in environ] if environ is not None else []
    return LaunchError(f"{what}{'; set are: ' + ', '.join(came) if came else ''}. {HOW_TO_START}.")


def required(environ: Mapping[str, str], name: str) -> str:
    if not environ.get(name):
        raise launch_error(f"{name} must be set beside the other variables of the job", environ)
    return environ[name]


def number(environ: Mapping[str, str], name: str) -> int:
    text = required(environ, name)
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise launch_error(f"{name} must be a whole number, not {text!r}")
    return int(text)


def rank_and_size(environ: Mapping[str, str], rank_name: str, size_name: str) -> tuple[int, int]:
    rank, size = number(environ, rank_name), number(environ, size_name)
    if not rank < size:
        raise launch_error(f"{rank_name}={rank} must be below {size_name}={size}")
    return rank, size


def host_and_port(environ: Mapping[str, str], name: str) -> str:
    text = required(environ, name)
    host, _, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]") and len(host) > 2
    if not host or (not bracketed and any(c in host for c in ":[]")) or not (port.isascii() and port.isdigit()):
        raise launch_error(f"{name} must be host:port (an IPv6 address in brackets), not {text!r}")
    if len(port) > 5 or not 0 < int(port) < 65536:
        raise launch_error(f"the port of {name} must be between 1 and 65535, not {port}")
    return text


def seconds(environ: Mapping[str, str], name: str, default: float) -> float:
    text = environ.get(name, "")
    try:
        value = float(text) if text else default
    except ValueError:
        value = -1.0
    if not 0 < value < 1e9:
        raise launch_error(f"{name} must be a number of seconds above 0, not {text!r}")
    return value


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
