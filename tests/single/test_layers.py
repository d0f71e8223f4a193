"""The house's rules, checked on the sources: arrows point down only, and everything foreign stays in its room."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"

# What each room may include, beside itself (DESIGN, section 1).
MAY_INCLUDE = {
    "base": set(),
    "kernels": {"base"},
    "transport": {"base"},
    "plan": {"transport", "kernels", "base"},
    "comm": {"plan", "transport", "kernels", "base"},
    "engine": {"comm", "plan", "transport", "kernels", "base"},
    "bind": {"engine", "comm", "plan", "transport", "kernels", "base"},
}
SOURCES = sorted(p for p in CSRC.rglob("*") if p.suffix in {".cc", ".h", ".cu", ".cuh"})
SIBLINGS = {"transport": {"shm.h", "tcp.h", "mpi.h"}, "comm": {"shm.h", "native.h", "mpi.h", "nccl.h", "cuda_ipc.h"}}
FACTORIES = {"transport/open.cc", "comm/communicator.cc"}


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s+[<"]([^>"]+)[>"]', path.read_text(), flags=re.M)


def room(path: Path) -> str:
    return path.relative_to(CSRC).parts[0]


def test_there_are_sources_in_every_room_that_has_been_opened():
    assert {room(p) for p in SOURCES} >= {"base", "kernels", "transport", "plan", "comm", "bind"}
    assert len(SOURCES) > 40


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(CSRC)))
def test_includes_point_down_only(path):
    for name in includes(path):
        target = name.split("/")[0]
        if target in MAY_INCLUDE and target != room(path):
            assert target in MAY_INCLUDE[room(path)], f"{room(path)}/ includes {name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(CSRC)))
def test_foreign_headers_stay_in_their_room(path):
    for name in includes(path):
        if name.startswith("pybind11"):
            assert room(path) == "bind", f"{path.name} includes {name}"
        if name.startswith(("cuda", "nccl")):
            assert path.suffix in {".cu", ".cuh"} or path.stem in {"nccl", "cuda_ipc"}, f"{path.name} includes {name}"
        assert not name.startswith(("torch/", "ATen/", "c10/", "mpi.h")), f"{path.name} includes {name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(CSRC)))
def test_sibling_implementations_do_not_know_each_other(path):
    if str(path.relative_to(CSRC)) in FACTORIES:
        return
    siblings = {f"{room(path)}/{name}" for name in SIBLINGS.get(room(path), set()) if Path(name).stem != path.stem}
    if path.name not in {Path(s).name for s in SIBLINGS.get(room(path), set())} | {"shm.cc", "tcp.cc", "native.cc"}:
        return
    assert not siblings & set(includes(path))


def test_only_the_table_of_settings_reads_the_environment():
    readers = [str(p.relative_to(CSRC)) for p in SOURCES if re.search(r"\bgetenv\s*\(", p.read_text())]
    assert readers == ["base/env.cc"]


def test_library_code_never_ends_the_process_but_for_broken_invariants():
    ending = re.compile(r"\b(?:std::)?(?:abort|exit|_exit|terminate)\s*\([^)]*\);")
    enders = [str(p.relative_to(CSRC)) for p in SOURCES if ending.search(p.read_text())]
    assert enders == ["base/error.cc", "base/failpoint.cc"]


def test_a_missing_feature_is_a_stub_file_not_an_ifdef():
    for path in SOURCES:
        assert not re.search(r"#\s*if(?:def|\s+defined).*ROUNDEL_(?:CUDA|MPI|NCCL)", path.read_text()), path


def test_the_core_imports_without_torch():
    import subprocess
    import sys

    code = "import sys, roundel; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_every_setting_is_in_the_table():
    from roundel import _core

    known = {name for name, *_ in _core.settings()}
    used = set()
    for path in SOURCES:
        used |= set(re.findall(r'env::(?:text|number|bytes|flag)\("(\w+)"', path.read_text()))
    assert used <= known
