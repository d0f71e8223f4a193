"""An optimizer's state of one parameter: which tensors there are, of what dtype, made when first needed or loaded.

Beside a rule's moments, under torch.optim's names: `step` (float32, one element), `master` (the float32 weights of a 16-bit
parameter), `ema` (the average of the weights).
"""

from __future__ import annotations

from typing import Any

import torch

from roundel.errors import InvalidArgumentError
from roundel.optim.options import Options

__all__ = ["complete", "loaded", "needs_master"]

_HALF = (torch.float16, torch.bfloat16)


def needs_master(param: torch.Tensor, options: Options) -> bool:
    """Whether the rule works on a float32 copy of this parameter."""
    return options.master_weights and param.dtype in _HALF


def _wide(param: torch.Tensor) -> torch.dtype:
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def _moment_dtype(param: torch.Tensor, options: Options) -> torch.dtype:
    if options.state_dtype is not None and param.dtype != torch.float64:
        return options.state_dtype
    return torch.float32 if needs_master(param, options) else param.dtype


def complete(
    state: dict[str, Any], param: torch.Tensor, moments: tuple[str, ...], counts: bool, group: dict[str, Any], options: Options
) -> None:
    """Add what the state lacks: all of it before a parameter's first step, some after loading from another optimizer.

    counts: whether the rule needs `step`.
    """
    param = param.detach()
    if counts and "step" not in state:
        # A momentum that came without a step count, as torch's SGD saves it, has had its first step.
        known = any(isinstance(state.get(name), torch.Tensor) for name in moments)
        state["step"] = torch.full((), float(known), dtype=torch.float32, device=param.device)
    for name in moments:
        if not isinstance(state.get(name), torch.Tensor):  # older torch saves None for a momentum that is not there yet
            value = group["initial_accumulator_value"] if name == "sum" else 0.0
            state[name] = torch.full_like(param, float(value), dtype=_moment_dtype(param, options))
    if needs_master(param, options) and "master" not in state:
        state["master"] = param.to(torch.float32, copy=True)
    if group["ema_decay"] is not None and "ema" not in state:
        state["ema"] = state.get("master", param).to(_wide(param), copy=True)


def loaded(param: torch.Tensor, name: str, value: Any, options: Options) -> Any:
    """A saved value as this optimizer keeps it: a copy on the parameter's device, of its layout.

    Moments keep the dtype that they were saved in, unless an option asks for one; float64 goes with float64 parameters only.
    """
    if not isinstance(value, torch.Tensor):
        return torch.tensor(float(value), dtype=torch.float32, device=param.device) if name == "step" else value
    if name == "step":
        return value.detach().to(device=param.device, dtype=torch.float32, copy=True).reshape(())
    if value.shape != param.shape:
        if value.is_floating_point() and name in _PER_ELEMENT:
            raise InvalidArgumentError(
                f"load_state_dict: expected '{name}' of shape {tuple(param.shape)} as its parameter, got {tuple(value.shape)}"
            )
        return value.detach().to(device=param.device, copy=True)
    return torch.empty_like(param, dtype=_dtype_to_keep(param, name, value, options), requires_grad=False).copy_(value.detach())


_PER_ELEMENT = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg", "sum", "master", "ema")


def _dtype_to_keep(param: torch.Tensor, name: str, value: torch.Tensor, options: Options) -> torch.dtype:
    if not value.is_floating_point():
        return value.dtype
    if name in ("master", "ema"):
        return _wide(param)
    asked = options.state_dtype is not None or needs_master(param, options)
    if asked or torch.float64 in (param.dtype, value.dtype):
        return _moment_dtype(param, options)
    return value.dtype
