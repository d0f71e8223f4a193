"""Prints docs/env.md from the core's table of settings: `make docs`."""

from roundel import _core

print("# Environment variables\n")
print("Read by the core from its one table (`csrc/base/env.cc`); this page is made by `make docs`.\n")
print("| variable | default | meaning |\n|---|---|---|")
for name, default, doc in _core.settings():
    shown = f"`{default}`" if default else ""
    print(f"| `{name}` | {shown} | {doc} |")
print("""
Set by launchers, read by `roundel.launch.detect`: `ROUNDEL_RANK`, `ROUNDEL_SIZE`, `ROUNDEL_LOCAL_RANK`,
`ROUNDEL_LOCAL_SIZE`, `ROUNDEL_RENDEZVOUS` (host:port of rank 0), and the job's 32-byte token from `ROUNDEL_TOKEN_FD`
(inherited) or `ROUNDEL_TOKEN_FILE` (mode 0600).""")
