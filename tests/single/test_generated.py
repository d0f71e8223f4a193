"""Files that are generated and kept are up to date: `make stubs docs` makes them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

from roundel import _core

ROOT = Path(__file__).parents[2]


def test_env_page_is_the_cores_table():
    made = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "make_env.py")], capture_output=True, text=True, check=True, timeout=60
    )
    assert made.stdout == (ROOT / "docs" / "env.md").read_text()


def test_stubs_name_what_the_core_has():
    tree = ast.parse((ROOT / "python" / "roundel" / "_core.pyi").read_text())
    stubs = {node.name: node for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
    assert set(stubs) == {name for name in dir(_core) if not name.startswith("_")}
    for name, node in stubs.items():
        if isinstance(node, ast.ClassDef):
            members = {n.name for n in node.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")}
            assert members == {m for m in dir(getattr(_core, name)) if not m.startswith("_")}, name
