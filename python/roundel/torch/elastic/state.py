"""TorchState: models, optimizers, schedulers, samplers and Python objects, saved, restored and synchronized together."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from roundel.elastic.state import ObjectState
from roundel.torch.elastic.sampler import ElasticSampler
from roundel.torch.functions import broadcast_object, broadcast_optimizer_state, broadcast_parameters
from roundel.world import rank

__all__ = ["StateHandler", "TorchState", "get_handler_registry", "set_handler_registry"]


class StateHandler:
    """Keeps a copy of the state_dict() of an object; a subclass says how ranks take rank 0's."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.save()

    def save(self) -> None:
        """Keep a copy."""
        self._saved = copy.deepcopy(self.value.state_dict())

    def restore(self) -> None:
        """Go back to the last copy."""
        self.value.load_state_dict(copy.deepcopy(self._saved))

    def sync(self) -> None:
        """Take rank 0's state, and keep a copy."""
        self.value.load_state_dict(broadcast_object(self.value.state_dict(), name="elastic state"))
        self.save()

    def set_value(self, value: Any) -> None:
        """Another object in its place."""
        self.value = value
        self.save()


class ModelStateHandler(StateHandler):
    """Of a torch.nn.Module."""

    def sync(self) -> None:
        """Broadcast parameters and buffers from rank 0."""
        broadcast_parameters(self.value.state_dict(), root_rank=0)
        self.save()


class OptimizerStateHandler(StateHandler):
    """Of a torch.optim.Optimizer."""

    def restore(self) -> None:
        """Go back to the last copy. Gradients that are left are of the step that failed."""
        super().restore()
        for group in self.value.param_groups:
            for p in group["params"]:
                p.grad = None

    def sync(self) -> None:
        """Broadcast state and hyper-parameters from rank 0."""
        broadcast_optimizer_state(self.value, root_rank=0)
        self.save()


_registry: list[tuple[type, Callable[[Any], StateHandler]]] = [
    (torch.nn.Module, ModelStateHandler),
    (torch.optim.Optimizer, OptimizerStateHandler),
    (torch.optim.lr_scheduler.LRScheduler, StateHandler),
    (ElasticSampler, StateHandler),
]


def get_handler_registry() -> list[tuple[type, Callable[[Any], StateHandler]]]:
    """(type, handler of objects of that type), the first that fits counts."""
    return _registry


def set_handler_registry(registry: list[tuple[type, Callable[[Any], StateHandler]]]) -> None:
    """Replace it, for states made from now on."""
    global _registry
    _registry = registry


class TorchState(ObjectState):
    """A training's state. model, optimizer and every other keyword argument become attributes.

    Modules, optimizers, learning-rate schedulers and ElasticSamplers are saved and restored by their state_dict(), and
    broadcast as what they are; anything else is a Python object, copied and pickled.
    """

    def __init__(
        self, model: torch.nn.Module | None = None, optimizer: torch.optim.Optimizer | None = None, **kwargs: Any
    ) -> None:
        kwargs |= {"model": model, "optimizer": optimizer}
        self._handlers: dict[str, StateHandler] = {}
        for name, value in list(kwargs.items()):
            make = next((handler for kind, handler in _registry if isinstance(value, kind)), None)
            if make is not None:
                setattr(self, name, value)
                self._handlers[name] = make(kwargs.pop(name))
        super().__init__(bcast_object=lambda obj: broadcast_object(obj, name="elastic state"), get_rank=rank, **kwargs)

    def save(self) -> None:
        """Keep copies of everything in host memory."""
        for handler in self._handlers.values():
            handler.save()
        super().save()

    def restore(self) -> None:
        """Go back to the last copies."""
        for handler in self._handlers.values():
            handler.restore()
        super().restore()

    def sync(self) -> None:
        """Take everything from rank 0, and keep copies."""
        for handler in self._handlers.values():
            handler.sync()
        super().sync()

    def reset(self) -> None:
        """Divide what samplers have left among the ranks there are."""
        for handler in self._handlers.values():
            if isinstance(handler.value, ElasticSampler):
                handler.value.reset()

    def __setattr__(self, name: str, value: Any) -> None:
        handler = vars(self).get("_handlers", {}).get(name)
        if handler is not None:
            handler.set_value(value)
        super().__setattr__(name, value)
