"""Every rule by its formula, in float64, one tensor and one line at a time: what the fused optimizers are compared with.

A group is a dict of hyper-parameters under torch.optim's names; a state is a dict of float64 tensors and the count "t".
torch's formulas are those of torch.optim's documentation, Keras's those of keras.optimizers (version 3).
"""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Many small steps: torch's threads would only wait for each other, long on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


ZERO_STATES = {
    "sgd": ("momentum_buffer",),
    "adam": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    "rmsprop": ("square_avg", "grad_avg", "momentum_buffer"),
    "adagrad": (),
    "lion": ("exp_avg",),
    "lamb": ("exp_avg", "exp_avg_sq"),
    "lars": ("momentum_buffer",),
}


def new_state(rule: str, group: dict, p: torch.Tensor) -> dict:
    state = {name: torch.zeros_like(p, dtype=torch.float64) for name in ZERO_STATES[rule]}
    if rule == "adagrad":
        state["sum"] = torch.full_like(p, group["initial_accumulator_value"], dtype=torch.float64)
    return {**state, "t": 0}


def step(rule: str, group: dict, p: torch.Tensor, g: torch.Tensor, state: dict) -> torch.Tensor:
    """The parameter after a step, in float64; the state is changed."""
    keras = group.get("semantics", "torch") == "keras"
    p, g = p.double(), g.double()
    if group.get("maximize"):
        g = -g
    state["t"] += 1
    lr, decay = group["lr"], group["weight_decay"]
    if (keras and rule != "lars") or rule == "lion" or (rule == "adam" and group.get("decoupled_weight_decay")):
        p = p - lr * decay * p
    elif rule in ("sgd", "adam", "rmsprop", "adagrad"):
        g = g + decay * p
    return RULES[rule](group, p, g, state, keras)


def _sgd(h: dict, p: torch.Tensor, g: torch.Tensor, s: dict, keras: bool) -> torch.Tensor:
    lr, momentum = h["lr"], h["momentum"]
    if momentum == 0:
        return p - lr * g
    if keras:
        s["momentum_buffer"] = momentum * s["momentum_buffer"] - lr * g
        return p + (momentum * s["momentum_buffer"] - lr * g if h["nesterov"] else s["momentum_buffer"])
    first = s["t"] == 1
    s["momentum_buffer"] = g if first else momentum * s["momentum_buffer"] + (1 - h["dampening"]) * g
    return p - lr * (g + momentum * s["momentum_buffer"] if h["nesterov"] else s["momentum_buffer"])


def _adam_moments(h: dict, g: torch.Tensor, s: dict) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    beta1, beta2 = h["betas"]
    s["exp_avg"] = beta1 * s["exp_avg"] + (1 - beta1) * g
    s["exp_avg_sq"] = beta2 * s["exp_avg_sq"] + (1 - beta2) * g * g
    return s["exp_avg"], s["exp_avg_sq"], 1 - beta1 ** s["t"], 1 - beta2 ** s["t"]


def _adam(h: dict, p: torch.Tensor, g: torch.Tensor, s: dict, keras: bool) -> torch.Tensor:
    m, v, bias1, bias2 = _adam_moments(h, g, s)
    if h["amsgrad"]:
        v = s["max_exp_avg_sq"] = torch.maximum(s["max_exp_avg_sq"], v)
    if keras:
        return p - h["lr"] * bias2**0.5 / bias1 * m / (v.sqrt() + h["eps"])
    return p - h["lr"] * (m / bias1) / ((v / bias2).sqrt() + h["eps"])


def _rmsprop(h: dict, p: torch.Tensor, g: torch.Tensor, s: dict, keras: bool) -> torch.Tensor:
    lr, alpha, eps, momentum = h["lr"], h["alpha"], h["eps"], h["momentum"]
    v = s["square_avg"] = alpha * s["square_avg"] + (1 - alpha) * g * g
    if h["centered"]:
        s["grad_avg"] = alpha * s["grad_avg"] + (1 - alpha) * g
        v = v - s["grad_avg"] ** 2
    move = lr * g / (v + eps).sqrt() if keras else g / (v.sqrt() + eps)
    if momentum > 0:
        move = s["momentum_buffer"] = momentum * s["momentum_buffer"] + move
    return p - (move if keras else lr * move)


def _adagrad(h: dict, p: torch.Tensor, g: torch.Tensor, s: dict, keras: bool) -> torch.Tensor:
    s["sum"] = s["sum"] + g * g
    if keras:
        return p - h["lr"] * g / (s["sum"] + h["eps"]).sqrt()
    return p - h["lr"] / (1 + (s["t"] - 1) * h["lr_decay"]) * g / (s["sum"].sqrt() + h["eps"])


def _lion(h: dict, p: torch.Tensor, g: torch.Tensor, s: dict, keras: bool) -> torch.Tensor:
    (beta1, beta2), m = h["betas"], s["exp_avg"]
    s["exp_avg"] = beta2 * m + (1 - beta2) * g
    return p - h["lr"] * torch.sign(beta1 * m + (1 - beta1) * g)


def _lamb(h: dict, p: torch.Tensor, g: torch.Tensor, s: dict, keras: bool) -> torch.Tensor:
    m, v, bias1, bias2 = _adam_moments(h, g, s)
    update = (m / bias1) / ((v / bias2).sqrt() + h["eps"])
    if not keras:
        update = update + h["weight_decay"] * p
    norm, length = p.norm(), update.norm()
    return p - h["lr"] * (norm / length if norm > 0 and length > 0 else 1.0) * update


def _lars(h: dict, p: torch.Tensor, g: torch.Tensor, s: dict, keras: bool) -> torch.Tensor:
    lr, momentum, decay = h["lr"], h["momentum"], h["weight_decay"]  # Keras has no LARS: the paper's, lr inside the buffer
    norm, length = p.norm(), g.norm()
    rate = h["trust_coefficient"] * norm / (length + decay * norm + h["eps"]) if norm > 0 and length > 0 else 1.0
    d = rate * (g + decay * p)
    if momentum == 0:
        return p - lr * d
    if keras:
        d = lr * d
    b = s["momentum_buffer"] = momentum * s["momentum_buffer"] + d
    move = d + momentum * b if h["nesterov"] else b
    return p - (move if keras else lr * move)


RULES = {"sgd": _sgd, "adam": _adam, "rmsprop": _rmsprop, "adagrad": _adagrad, "lion": _lion, "lamb": _lamb, "lars": _lars}
