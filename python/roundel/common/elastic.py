"""States, under the name of the module that has them in Horovod."""

from roundel.elastic import ObjectState, State, run_fn

__all__ = ["ObjectState", "State", "run_fn"]
