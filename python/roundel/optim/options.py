"""What all fused optimizers can be told beside torch.optim's arguments, and how arguments are checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from roundel.errors import InvalidArgumentError

__all__ = ["Default", "Options", "check_betas", "check_numbers", "one_number"]

SEMANTICS = ("torch", "keras")
STATE_DTYPES = (None, torch.float32, torch.bfloat16, torch.float16)


class Default(float):
    """A default value of torch's semantics that knows Keras's."""

    keras: float

    def __new__(cls, value: float, keras: float) -> Default:
        self = super().__new__(cls, value)
        self.keras = float(keras)
        return self

    def chosen(self, semantics: str) -> float:
        """The plain number."""
        return self.keras if semantics == "keras" else float(self)


@dataclass(frozen=True)
class Options:
    """Keyword arguments of every optimizer here, after torch.optim's.

    semantics: "torch" or "keras": whose formulas and default values, where they differ (docs/optimizers.md has the table).
    master_weights: float16 and bfloat16 parameters get a float32 copy in the state, which is what the rule updates; the
        parameter receives it rounded.
    state_dtype: of moments; default: the parameter's dtype, or float32 with master_weights.
    stochastic_rounding: 16-bit results are rounded up or down at random, so that small updates count on average. Bits depend
        on seed, the parameter's step and the element only.
    ema_decay: keep an exponential moving average of the weights: ema = ema_decay * ema + (1 - ema_decay) * weight.
    max_norm: clip all gradients together to this norm, as clip_grad_norm_ would, within step(). A step whose norm is not
        finite is skipped.
    """

    semantics: str = "torch"
    master_weights: bool = False
    state_dtype: torch.dtype | None = None
    stochastic_rounding: bool = False
    seed: int = 0
    ema_decay: float | None = None
    max_norm: float | None = None

    def __post_init__(self) -> None:
        if self.semantics not in SEMANTICS:
            raise InvalidArgumentError(f"semantics: expected 'torch' or 'keras', got {self.semantics!r}")
        if self.state_dtype not in STATE_DTYPES:
            raise InvalidArgumentError(f"state_dtype: expected torch.float32, bfloat16 or float16, got {self.state_dtype!r}")
        if self.ema_decay is not None and not 0 <= self.ema_decay <= 1:
            raise InvalidArgumentError(f"ema_decay: expected a number from 0 to 1, got {self.ema_decay!r}")
        if self.max_norm is not None and not self.max_norm > 0:
            raise InvalidArgumentError(f"max_norm: expected a number above 0, got {self.max_norm!r}")


def one_number(value: Any, name: str) -> float:
    """A number, or a tensor of one element, as a float."""
    if isinstance(value, torch.Tensor) and value.numel() != 1:
        raise InvalidArgumentError(f"{name}: expected a number or a tensor of one element, got one of {value.numel()}")
    return float(value)


def check_numbers(**values: Any) -> None:
    """Each must be a number from 0 on."""
    for name, value in values.items():
        number = one_number(value, name)
        if not number >= 0 or math.isinf(number):
            raise InvalidArgumentError(f"{name}: expected a number from 0 on, got {number}")


def check_betas(betas: Any) -> None:
    """Two numbers from 0 to below 1, or tensors of one element."""
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise InvalidArgumentError(f"betas: expected two numbers, got {betas!r}")
    for i, beta in enumerate(betas):
        if not 0 <= one_number(beta, f"betas[{i}]") < 1:
            raise InvalidArgumentError(f"betas[{i}]: expected a number from 0 to below 1, got {float(beta)}")
