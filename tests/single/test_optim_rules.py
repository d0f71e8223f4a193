"""Every rule with every option takes torch.optim's steps, and Keras's with semantics="keras".

Random hyper-parameters, three param groups, gradients that are missing now and then. The judge is torch.optim in float64, and
the formula in float64 (optim_reference.py) for what torch does not have; the two must agree where both exist. An error is the
largest difference in a tensor over its largest element.
"""

from __future__ import annotations

import random

import optim_reference as reference
import pytest
import roundel.optim
import torch
from optim_reference import one_thread  # noqa: F401

DRAWS, STEPS = 50, 20
SHAPES = [(7,), (4, 5), (33,), (3, 2, 4), (1,), (70,)]  # two to a group
LARGEST_ERROR = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-5}  # bfloat16: of its float32 masters

OPTIMIZERS = ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Lion", "LAMB", "LARS"]
RULES = {"AdamW": "adam"}
IN_TORCH = OPTIMIZERS[:5]


def rule_of(name: str) -> str:
    return RULES.get(name, name.lower())


def draw_numbers(name: str, draw: random.Random) -> dict:
    """What may differ between param groups."""
    numbers = {"lr": 10 ** draw.uniform(-3, -1), "weight_decay": draw.choice([0, 10 ** draw.uniform(-3, -1)])}
    if name in ("Adam", "AdamW", "Lion", "LAMB"):
        numbers["betas"] = (draw.uniform(0.5, 0.99), draw.uniform(0.8, 0.9999))
    if name in ("Adam", "AdamW", "RMSprop", "Adagrad", "LAMB", "LARS"):
        numbers["eps"] = 10 ** draw.uniform(-10, -3)
    if name in ("SGD", "LARS"):
        numbers["momentum"] = draw.uniform(0.1, 0.99)
    if name == "RMSprop":
        numbers |= {"alpha": draw.uniform(0.8, 0.999), "momentum": draw.choice([0, draw.uniform(0.1, 0.99)])}
    if name == "Adagrad":
        numbers["lr_decay"] = draw.choice([0, draw.uniform(0, 0.1)])
    if name == "LARS":
        numbers["trust_coefficient"] = 10 ** draw.uniform(-3, -1)
    return numbers


def draw_arguments(name: str, draw: random.Random, semantics: str = "torch") -> tuple[dict, list[dict]]:
    """Arguments of the class, and what each group has instead."""
    arguments = {**draw_numbers(name, draw), "maximize": draw.random() < 0.3}
    if name == "SGD":
        arguments["nesterov"] = draw.random() < 0.5
        if not arguments["nesterov"] and semantics == "torch":
            arguments["dampening"] = draw.choice([0, draw.uniform(0, 0.9)])
        if draw.random() < 0.2:
            arguments |= {"momentum": 0, "nesterov": False}
    if name == "LARS":
        arguments["nesterov"] = draw.random() < 0.5
    if name in ("Adam", "AdamW"):
        arguments["amsgrad"] = draw.random() < 0.4
    if name == "Adagrad":
        arguments["initial_accumulator_value"] = draw.choice([0, 0.1])  # torch overlooks a group's own
    if name == "RMSprop":
        arguments["centered"] = draw.random() < 0.5
    groups = [{}, draw_numbers(name, draw), draw_numbers(name, draw)]
    if semantics == "keras":
        for numbers in (arguments, *groups):
            numbers.pop("lr_decay", None)
    if not arguments.get("momentum", 1):
        for numbers in groups:
            numbers.pop("momentum", None)
    return arguments, groups


def values(seed: int) -> tuple[list[torch.Tensor], list[list[torch.Tensor | None]]]:
    """Parameters and the gradients of all steps, exact in every dtype (bfloat16 numbers)."""
    random_ = torch.Generator().manual_seed(seed)

    def normal(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=random_).bfloat16().double()

    def missing(step: int, i: int) -> bool:
        return i % 2 == 1 and (seed + step + i) % 5 == 0

    params = [normal(shape) for shape in SHAPES]
    grads = [[None if missing(step, i) else normal(shape) for i, shape in enumerate(SHAPES)] for step in range(STEPS)]
    return params, grads


def train(kind: type, arguments: dict, groups: list[dict], dtype: torch.dtype, seed: int) -> tuple[list, torch.optim.Optimizer]:
    params, grads = values(seed)
    params = [torch.nn.Parameter(p.to(dtype)) for p in params]
    optimizer = kind([{"params": params[2 * i : 2 * i + 2], **group} for i, group in enumerate(groups)], **arguments)
    for step in grads:
        for p, grad in zip(params, step, strict=True):
            p.grad = None if grad is None else grad.to(dtype)
        optimizer.step()
    return params, optimizer


def by_formula(optimizer: torch.optim.Optimizer, rule: str, seed: int) -> list[torch.Tensor]:
    """Where the formula takes the parameters, with the hyper-parameters that the optimizer's groups have."""
    params, grads = values(seed)
    groups = [group for group in optimizer.param_groups for _ in group["params"]]
    states = [reference.new_state(rule, group, p) for group, p in zip(groups, params, strict=True)]
    for step in grads:
        for i, grad in enumerate(step):
            if grad is not None:
                params[i] = reference.step(rule, groups[i], params[i], grad, states[i])
    return params


def largest_error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    pairs = zip(found, expected, strict=True)
    return max(((a.detach().double() - b.detach()).abs().max() / b.detach().abs().max()).item() for a, b in pairs)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_torch_and_of_the_formula(name):
    draw = random.Random(name)
    worst = dict.fromkeys(LARGEST_ERROR, 0.0)
    for seed in range(DRAWS):
        arguments, groups = draw_arguments(name, draw)
        for dtype in LARGEST_ERROR:
            mixed = {"master_weights": True} if dtype == torch.bfloat16 else {}
            params, optimizer = train(getattr(roundel.optim, name), arguments | mixed, groups, dtype, seed)
            if dtype == torch.bfloat16:
                params = [optimizer.state[p]["master"] for p in params]
            if dtype == torch.float64:
                expected = by_formula(optimizer, rule_of(name), seed)
                if name in IN_TORCH:
                    formula, (expected, _) = expected, train(getattr(torch.optim, name), arguments, groups, dtype, seed)
                    assert largest_error(formula, expected) < 1e-12
            error = largest_error(params, expected)
            assert error < LARGEST_ERROR[dtype], (seed, dtype, arguments, groups)
            worst[dtype] = max(worst[dtype], error)
    print(name, {str(dtype): f"{error:.1e}" for dtype, error in worst.items()})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_keras_steps_are_those_of_the_formula(name):
    draw = random.Random(name)
    for seed in range(DRAWS // 5):
        arguments, groups = draw_arguments(name, draw, "keras")
        for dtype in (torch.float64, torch.float32):
            params, optimizer = train(getattr(roundel.optim, name), {**arguments, "semantics": "keras"}, groups, dtype, seed)
            if dtype == torch.float64:
                expected = by_formula(optimizer, rule_of(name), seed)
            assert largest_error(params, expected) < LARGEST_ERROR[dtype], (seed, dtype, arguments, groups)


@pytest.mark.parametrize("name", ["SGD", "Adam", "RMSprop", "Adagrad"])
def test_semantics_differ(name):
    """A formula with the other's epsilon or buffer would be caught by the test before: the two are apart."""
    draw = random.Random(name)
    arguments, groups = draw_arguments(name, draw, "keras")
    arguments |= {"eps": 1e-3, "weight_decay": 0} if name != "SGD" else {"weight_decay": 0.1}
    ends = [
        train(getattr(roundel.optim, name), {**arguments, "semantics": semantics}, groups, torch.float64, 0)[0]
        for semantics in ("torch", "keras")
    ]
    assert largest_error(*ends) > 1e-4


# Minimizing x^2 / 2, as the examples in Keras's documentation do: start, arguments, and x after one and two steps.
KERAS_EXAMPLES = {
    "RMSprop": (10.0, {"lr": 0.1}, 9.683772233983163),
    "Adam": (10.0, {"lr": 0.1}, 9.9),
    "SGD": (1.0, {"lr": 0.1}, 0.9),
    "Adagrad": (10.0, {"lr": 0.1}, 9.90005),
}


@pytest.mark.parametrize("name", KERAS_EXAMPLES)
def test_first_step_of_keras_documentation(name):
    start, arguments, end = KERAS_EXAMPLES[name]
    x = torch.nn.Parameter(torch.tensor([start], dtype=torch.float64))
    optimizer = getattr(roundel.optim, name)([x], semantics="keras", **arguments)
    (x.square() / 2).sum().backward()
    optimizer.step()
    assert x.item() == pytest.approx(end, rel=1e-6)


def test_keras_momentum_holds_the_learning_rate():
    """keras.optimizers.SGD(learning_rate=0.1, momentum=0.9) on x^2 / 2 from 1: 0.9, then 0.9 + (0.9 * -0.1 - 0.09)."""
    x = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = roundel.optim.SGD([x], lr=0.1, momentum=0.9, semantics="keras")
    for end in (0.9, 0.72):
        x.grad = x.detach().clone()
        optimizer.step()
        assert x.item() == pytest.approx(end, rel=1e-12)
    assert optimizer.state[x]["momentum_buffer"].item() == pytest.approx(-0.18, rel=1e-12)


def test_defaults_are_those_of_the_semantics():
    x = [torch.nn.Parameter(torch.zeros(1))]
    keras = {
        "SGD": {"lr": 0.01},
        "Adam": {"lr": 1e-3, "eps": 1e-7},
        "AdamW": {"weight_decay": 4e-3, "eps": 1e-7},
        "RMSprop": {"lr": 1e-3, "alpha": 0.9, "eps": 1e-7},
        "Adagrad": {"lr": 1e-3, "initial_accumulator_value": 0.1, "eps": 1e-7},
        "Lion": {"lr": 1e-3},
        "LAMB": {"lr": 1e-3, "eps": 1e-7, "weight_decay": 0},
    }
    for name, expected in keras.items():
        group = getattr(roundel.optim, name)(x, semantics="keras").param_groups[0]
        assert {key: group[key] for key in expected} == expected, name
        assert all(type(value) is not roundel.optim.options.Default for value in group.values())
    for name in IN_TORCH:
        ours, theirs = (getattr(module, name)(x).param_groups[0] for module in (roundel.optim, torch.optim))
        assert {key: ours[key] for key in theirs} == theirs, name
