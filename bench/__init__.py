"""Benchmarks. `python -m bench allreduce -np 2 -b 8 -e 64M -f 2`; see bench/README.md."""
