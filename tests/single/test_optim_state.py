"""state_dict goes both ways between ours and torch.optim's in mid-training; copies, pickles and older checkpoints work."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import roundel.optim
import torch
from optim_reference import one_thread  # noqa: F401
from roundel.errors import InvalidArgumentError

CASES = {
    "SGD": [{"momentum": 0.9, "dampening": 0.3}, {"momentum": 0.9, "nesterov": True}, {}],
    "Adam": [{"amsgrad": True, "weight_decay": 0.1}, {}],
    "AdamW": [{}, {"amsgrad": True}],
    "RMSprop": [{"momentum": 0.5, "centered": True}, {}],
    "Adagrad": [{"lr_decay": 0.1, "initial_accumulator_value": 0.2}],
}
BOTH = [(name, arguments) for name, cases in CASES.items() for arguments in cases]
OURS = {**{name: cases[0] for name, cases in CASES.items()}, "Lion": {}, "LAMB": {}, "LARS": {"nesterov": True}}


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    random = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=random).to(dtype)) for shape in ((5, 3), (17,), (2,))]


def advance(optimizer: torch.optim.Optimizer, steps: range, without: tuple[int, ...] = ()) -> list[torch.Tensor]:
    """Steps with gradients that depend on the step's number only. Returns copies of the parameters."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in steps:
        random = torch.Generator().manual_seed(100 + step)
        for i, p in enumerate(params):
            grad = torch.randn(p.shape, generator=random).to(p.dtype)
            p.grad = None if i in without else grad
        optimizer.step()
    return [p.detach().clone() for p in params]


def two_groups(module, name: str, dtype: torch.dtype = torch.float32, **arguments) -> torch.optim.Optimizer:
    params = parameters(dtype)
    return getattr(module, name)([{"params": params[:2]}, {"params": params[2:], "lr": 0.02}], lr=0.01, **arguments)


def close(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float = 1e-6) -> bool:
    return all(
        torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance) for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize(("name", "arguments"), BOTH)
@pytest.mark.parametrize(("before", "after"), [(torch.optim, roundel.optim), (roundel.optim, torch.optim)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_checkpoint_of_either_goes_on_in_the_other(name, arguments, before, after, dtype):
    expected = advance(two_groups(torch.optim, name, dtype, **arguments), range(6))
    first = two_groups(before, name, dtype, **arguments)
    middle = advance(first, range(3))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = two_groups(after, name, dtype)  # its own arguments are replaced by the saved ones
    for p, values in zip([p for g in second.param_groups for p in g["params"]], middle, strict=True):
        p.data.copy_(values)
    second.load_state_dict(torch.load(file))
    assert close(advance(second, range(3, 6)), expected, 1e-6 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize(("name", "arguments"), BOTH)
def test_state_has_the_form_of_torch(name, arguments):
    dicts = []
    for module in (torch.optim, roundel.optim):
        optimizer = two_groups(module, name, **arguments)
        advance(optimizer, range(2))
        dicts.append(optimizer.state_dict())
    theirs, ours = dicts
    assert ours["state"].keys() == theirs["state"].keys()
    for key, state in theirs["state"].items():
        there = {k: v for k, v in state.items() if v is not None}
        assert ours["state"][key].keys() == there.keys()
        for k, v in there.items():
            assert (ours["state"][key][k].shape, ours["state"][key][k].dtype) == (v.shape, v.dtype)
            assert torch.allclose(ours["state"][key][k], v, rtol=1e-4, atol=1e-6)
    for group, their_group in zip(ours["param_groups"], theirs["param_groups"], strict=True):
        assert {k: group[k] for k in their_group} == their_group


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("way", ["state_dict", "pickle", "deepcopy"])
def test_own_copies_take_the_same_bits(name, way):
    options = {"ema_decay": 0.9, "stochastic_rounding": True, "seed": 3, "master_weights": True}
    original = two_groups(roundel.optim, name, torch.bfloat16, **OURS[name], **options)
    advance(original, range(3))
    if way == "state_dict":
        other = two_groups(roundel.optim, name, torch.bfloat16, **OURS[name], **options)
        for p, q in zip(original.state, other.param_groups[0]["params"] + other.param_groups[1]["params"], strict=True):
            q.data.copy_(p)
        other.load_state_dict(original.state_dict())
    else:
        other = pickle.loads(pickle.dumps(original)) if way == "pickle" else copy.deepcopy(original)
    ends = [advance(optimizer, range(3, 6)) for optimizer in (original, other)]
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    for state, copied in zip(original.state.values(), other.state.values(), strict=True):
        assert {"master", "ema"} <= state.keys() == copied.keys()
        assert all(torch.equal(state[k], copied[k]) and state[k] is not copied[k] for k in state)


def test_loading_copies():
    original = two_groups(roundel.optim, "Adam")
    advance(original, range(2))
    other = two_groups(roundel.optim, "Adam")
    other.load_state_dict(original.state_dict())
    before = [state["exp_avg"].clone() for state in original.state.values()]
    advance(other, range(2, 4))
    assert all(torch.equal(state["exp_avg"], b) for state, b in zip(original.state.values(), before, strict=True))
    assert all(state["step"] == 2 for state in original.state.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_moments_of_16_bit_parameters_stay(dtype):
    original = two_groups(roundel.optim, "AdamW", dtype, state_dtype=torch.float32)
    advance(original, range(3))
    saved = original.state_dict()
    assert all(state["exp_avg_sq"].dtype == torch.float32 for state in saved["state"].values())
    other = two_groups(roundel.optim, "AdamW", dtype)
    other.load_state_dict(saved)
    for state, copied in zip(original.state.values(), other.state.values(), strict=True):
        assert copied["exp_avg_sq"].dtype == torch.float32
        assert torch.equal(state["exp_avg_sq"], copied["exp_avg_sq"])
    for p, q in zip(original.state, other.state, strict=True):
        q.data.copy_(p)
    ends = [advance(optimizer, range(3, 5)) for optimizer in (original, other)]
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_masters_are_made_where_a_checkpoint_has_none():
    original = two_groups(torch.optim, "AdamW", torch.bfloat16)
    advance(original, range(3))
    other = two_groups(roundel.optim, "AdamW", torch.bfloat16, master_weights=True)
    other.load_state_dict(original.state_dict())
    weights = [p.detach().clone() for p in other.state]
    advance(other, range(3, 4), without=(2,))
    state = list(other.state.values())
    assert all(state[i][name].dtype == torch.float32 for i in range(2) for name in ("master", "exp_avg", "exp_avg_sq"))
    assert "master" not in state[2]
    assert all((state[i]["master"] - weights[i].float()).abs().max() < 0.1 for i in range(2))


def test_older_checkpoints_lack_entries():
    optimizer = two_groups(roundel.optim, "Adam")
    expected = advance(copy.deepcopy(optimizer), range(4))
    advance(optimizer, range(2))
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        for key in ("maximize", "amsgrad", "semantics", "ema_decay", "decoupled_weight_decay", "fused", "capturable"):
            del group[key]
    for state in saved["state"].values():
        state["step"] = 2  # a number, as torch saved it before 1.12
    optimizer.load_state_dict(saved)
    assert close(advance(optimizer, range(2, 4)), expected, 0)


def test_older_pickles_lack_attributes():
    optimizer = two_groups(roundel.optim, "Adam", weight_decay=0.1)
    state = copy.deepcopy(optimizer.__getstate__())
    del state["_options"], state["max_norm"]
    for group in state["param_groups"]:
        del group["semantics"]
    other = roundel.optim.Adam.__new__(roundel.optim.Adam)
    other.__setstate__(state)
    assert other.param_groups[0]["semantics"] == "torch"
    assert close(advance(other, range(2)), advance(optimizer, range(2)), 0)


def test_an_adam_checkpoint_becomes_an_adamw():
    original = two_groups(torch.optim, "Adam")
    advance(original, range(1))
    other = two_groups(roundel.optim, "AdamW")
    other.load_state_dict(original.state_dict())
    assert all(group["decoupled_weight_decay"] for group in other.param_groups)


def test_a_first_step_that_was_skipped_is_not_a_step():
    """A momentum buffer of zeros must not pass for one that has begun: dampening does not count in the first step."""
    optimizer = two_groups(roundel.optim, "SGD", momentum=0.9, dampening=0.5)
    expected = advance(copy.deepcopy(optimizer), range(2))
    optimizer.found_inf = torch.ones(())
    advance(optimizer, range(1))
    del optimizer.found_inf
    assert all("momentum_buffer" not in state for state in optimizer.state_dict()["state"].values())
    optimizer.load_state_dict(optimizer.state_dict())
    assert close(advance(optimizer, range(2)), expected, 0)


def test_wrong_shapes_and_groups_are_refused_and_change_nothing():
    optimizer = two_groups(roundel.optim, "Adam")
    advance(optimizer, range(1))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["exp_avg"] = torch.zeros(7)
    with pytest.raises(InvalidArgumentError, match=r"expected 'exp_avg' of shape \(5, 3\) as its parameter, got \(7,\)"):
        optimizer.load_state_dict(saved)
    del saved["param_groups"][1], saved["state"][0]
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(saved)
    assert next(iter(optimizer.state.values()))["exp_avg"].shape == (5, 3)
    assert optimizer.state_dict()["state"].keys() == {0, 1, 2}


def test_hooks_see_what_is_saved_and_loaded():
    optimizer, seen = two_groups(roundel.optim, "Adam"), []
    advance(optimizer, range(1))
    optimizer.register_state_dict_post_hook(lambda o, saved: {**saved, "mark": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, saved: seen.append((saved["mark"], len(saved["state"]))))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(len(o.state)))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [(1, 3), 3]


def test_state_taken_away_is_made_again():
    optimizer = two_groups(roundel.optim, "AdamW")
    advance(optimizer, range(3))
    fresh = two_groups(roundel.optim, "AdamW")
    for p, q in zip([p for g in optimizer.param_groups for p in g["params"]], parameters(), strict=True):
        p.data.copy_(q.data)
    optimizer.state.clear()
    assert close(advance(optimizer, range(2)), advance(fresh, range(2)), 0)
