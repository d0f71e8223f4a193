"""Modules under the names that they have in Horovod, for scripts that import them from there."""
