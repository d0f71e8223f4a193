"""Training that can go back to its last commit, under Horovod's names: State, ObjectState and run.

The job keeps its size: `run` restores and repeats where the job can go on, and raises where it cannot.
"""

from roundel.elastic.run import run_fn
from roundel.elastic.state import HostUpdateResult, ObjectState, State

__all__ = ["HostUpdateResult", "ObjectState", "State", "run_fn"]
