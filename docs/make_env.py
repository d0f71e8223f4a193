"""Prints docs/env.md from the core's table of settings: `make docs`."""

from roundel import _core

print("# Environment variables\n")
print("Read by the core from its one table (`csrc/base/env.cc`); this page is made by `make docs`.\n")
print("Where only Horovod's name is set it is read instead, and rank 0 says so once in its log.\n")
print("| variable | default | meaning | Horovod's name |\n|---|---|---|---|")
for name, default, doc, aliases in _core.settings():
    shown = f"`{default}`" if default else ""
    print(f"| `{name}` | {shown} | {doc} | {', '.join(f'`{alias}`' for alias in aliases)} |")
print("""
Set by launchers, read by `roundel.launch.detect`: `ROUNDEL_RANK`, `ROUNDEL_SIZE`, `ROUNDEL_LOCAL_RANK`,
`ROUNDEL_LOCAL_SIZE`, `ROUNDEL_RENDEZVOUS` (host:port of rank 0), and the job's 32-byte token from `ROUNDEL_TOKEN_FD`
(inherited) or `ROUNDEL_TOKEN_FILE` (mode 0600).""")
