"""hvd.elastic: training that can go back to its last commit. The job keeps its size.

@hvd.elastic.run
def train(state):
    for state.epoch in range(state.epoch, epochs):
        ...
        state.commit()

state = hvd.elastic.TorchState(model=model, optimizer=optimizer, epoch=0)
train(state)
"""

from collections.abc import Callable
from typing import Any

from roundel.elastic import ObjectState, State, run_fn
from roundel.torch.elastic.sampler import ElasticSampler
from roundel.torch.elastic.state import TorchState

__all__ = ["ElasticSampler", "ObjectState", "State", "TorchState", "run"]


def _reset() -> None:
    """Nothing: the job is what it was."""


def run(func: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of a training function, whose first argument is a State; see roundel.elastic.run_fn.

    Collectives before the call of the function would not be repeated: leave them to the function and to the state.
    """
    return run_fn(func, _reset)
