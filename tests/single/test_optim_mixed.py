"""Mixed precision: masters, 16-bit moments, stochastic rounding, averages, loss scaling, clipping, and skipped steps."""

from __future__ import annotations

import copy
import math

import pytest
import roundel.optim
import torch
from optim_reference import one_thread  # noqa: F401
from roundel.errors import InvalidArgumentError, RoundelError
from torch import nn

HALF = [torch.float16, torch.bfloat16]


def parameters(dtype: torch.dtype, shapes=((33, 5), (17,), (1024,))) -> list[nn.Parameter]:
    random = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=random).to(dtype)) for shape in shapes]


def give_gradients(params: list[nn.Parameter], seed: int, scale: float = 1.0) -> None:
    random = torch.Generator().manual_seed(100 + seed)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=random).bfloat16().float() * scale).to(p.dtype)


def copies(params: list[nn.Parameter]) -> list[torch.Tensor]:
    return [p.detach().clone() for p in params]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def norm_of(params: list[nn.Parameter]) -> float:
    return math.sqrt(sum(p.grad.double().square().sum().item() for p in params))


# ----- 16-bit parameters


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_adamw_has_the_bits_of_torchs_fused_one(dtype, amsgrad):
    ends = []
    for module in (torch.optim, roundel.optim):
        params = parameters(dtype)
        optimizer = module.AdamW(params, lr=1e-2, weight_decay=0.1, amsgrad=amsgrad, fused=True)
        for seed in range(10):
            give_gradients(params, seed)
            optimizer.step()
        ends.append(copies(params) + [optimizer.state[p][name] for p in params for name in ("exp_avg", "exp_avg_sq")])
    if dtype == torch.float32:  # torch's own paths differ in the last bit there
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(*ends, strict=True))
    else:
        assert equal(*ends)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["SGD", "AdamW", "RMSprop", "Adagrad", "Lion", "LAMB", "LARS"])
def test_masters_are_float32_training_and_parameters_their_rounding(dtype, name):
    arguments = {"lr": 1e-3, **({"momentum": 0.9} if name == "SGD" else {})}
    params = parameters(dtype)
    wide = [nn.Parameter(p.detach().float()) for p in params]
    kind = getattr(roundel.optim, name)
    optimizer, expected = kind(params, master_weights=True, **arguments), kind(wide, **arguments)
    for seed in range(20):
        give_gradients(params, seed)
        for p, w in zip(params, wide, strict=True):
            w.grad = p.grad.float()
        optimizer.step()
        expected.step()
    assert equal([optimizer.state[p]["master"] for p in params], copies(wide))
    assert equal(copies(params), [w.detach().to(dtype) for w in wide])


def test_moments_of_16_bits():
    params, expected = parameters(torch.float32), parameters(torch.float32)
    optimizer = roundel.optim.AdamW(params, lr=1e-2, state_dtype=torch.bfloat16)
    reference = roundel.optim.AdamW(expected, lr=1e-2)
    for seed in range(10):
        for some, one in ((params, optimizer), (expected, reference)):
            give_gradients(some, seed)
            one.step()
    for p, q in zip(params, expected, strict=True):
        assert optimizer.state[p]["exp_avg"].dtype == optimizer.state[p]["exp_avg_sq"].dtype == torch.bfloat16
        assert 0 < (p - q).abs().max() < 0.02
        # Rounding with v's own neighbours: a tenth more or less at most after ten steps.
        assert torch.allclose(optimizer.state[p]["exp_avg_sq"].float(), reference.state[q]["exp_avg_sq"], rtol=0.1, atol=1e-3)


@pytest.mark.parametrize("dtype", HALF)
def test_stochastic_rounding_counts_small_updates_on_average(dtype):
    """1 - 1e-4 rounds to 1 in 16 bits: nearest stands still, at random 100 steps go 0.01 down on average."""
    eps = torch.finfo(dtype).eps
    ends = {}
    for stochastic in (False, True):
        p = nn.Parameter(torch.full((20_000,), 1.5, dtype=dtype))
        optimizer = roundel.optim.SGD([p], lr=eps / 20, stochastic_rounding=stochastic, seed=1)
        for _ in range(100):
            p.grad = torch.ones_like(p)
            optimizer.step()
        ends[stochastic] = p.detach().double()
    assert (ends[False] == 1.5).all()
    moved = (1.5 - ends[True]).mean().item() / (100 * eps / 20)
    assert moved == pytest.approx(1, abs=0.01)  # its standard deviation is 0.003


def test_stochastic_rounding_depends_on_the_seed_and_the_step_only():
    def end(seed: int, threads: int, stop: int | None = None) -> list[torch.Tensor]:
        params = parameters(torch.bfloat16, ((100_003,), (7,)))
        optimizer = roundel.optim.AdamW(params, stochastic_rounding=True, seed=seed)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        for step in range(4):
            if step == stop:
                optimizer = copy.deepcopy(optimizer)
                params = optimizer.param_groups[0]["params"]
            give_gradients(params, step)
            optimizer.step()
        torch.set_num_threads(before)
        return copies(params)

    first = end(1, 1)
    assert equal(first, end(1, 2))
    assert equal(first, end(1, 1, stop=2))
    assert not equal(first, end(2, 1))


# ----- averages of the weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_average_of_weights(dtype):
    params = parameters(dtype)
    optimizer = roundel.optim.AdamW(params, lr=0.1, ema_decay=0.8, master_weights=True)
    expected = [p.double() for p in copies(params)]
    for seed in range(5):
        give_gradients(params, seed)
        optimizer.step()
        weights = [optimizer.state[p].get("master", p).detach().double() for p in params]
        expected = [0.8 * e + 0.2 * w for e, w in zip(expected, weights, strict=True)]
    averages = [optimizer.state[p]["ema"] for p in params]
    assert all(torch.allclose(a.double(), e, rtol=1e-6, atol=1e-7) for a, e in zip(averages, expected, strict=True))
    before = copies(params)
    with pytest.raises(KeyError), optimizer.averaged_weights():
        assert equal(copies(params), [a.to(dtype) for a in averages])
        raise KeyError
    assert equal(copies(params), before)


def test_average_decay_may_follow_a_schedule():
    params = parameters(torch.float32)
    optimizer = roundel.optim.SGD(params, lr=0.1, ema_decay=0.0)
    give_gradients(params, 0)
    optimizer.step()
    assert equal([optimizer.state[p]["ema"] for p in params], copies(params))
    held = copies(params)
    optimizer.param_groups[0]["ema_decay"] = 1.0
    optimizer.step()
    assert equal([optimizer.state[p]["ema"] for p in params], held)


# ----- clipping


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.float64,), (torch.bfloat16,), (torch.float32, torch.float16)])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clip_grad_norm(dtypes, max_norm):
    ours, theirs = ([p for dtype in dtypes for p in parameters(dtype)] for _ in range(2))
    for params in (ours, theirs):
        give_gradients(params, 0)
        params[0].grad = None
    norm = roundel.optim.clip_grad_norm_(iter(ours), max_norm)
    expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    tolerance = max(4 * torch.finfo(dtype).eps for dtype in dtypes)
    assert torch.allclose(norm.double(), expected.double(), rtol=tolerance)
    for p, q in zip(ours[1:], theirs[1:], strict=True):
        assert torch.allclose(p.grad.double(), q.grad.double(), rtol=tolerance, atol=1e-12)


def test_clip_grad_norm_of_thousands_is_exact():
    """All at once in float64: 3,000 tensors of 37 ones have the norm sqrt(111,000), also as the sum of many small."""
    params = [nn.Parameter(torch.zeros(37)) for _ in range(3000)]
    for p in params:
        p.grad = torch.ones(37)
    assert roundel.optim.clip_grad_norm_(params, 1e9).item() == pytest.approx(math.sqrt(111_000), rel=1e-7)
    assert roundel.optim.clip_grad_norm_(params, 1.0).item() == pytest.approx(math.sqrt(111_000), rel=1e-7)
    assert norm_of(params) == pytest.approx(1.0, rel=1e-5)


def test_clip_grad_norm_in_odd_cases():
    p = nn.Parameter(torch.zeros(3))
    assert roundel.optim.clip_grad_norm_([p], 1.0) == 0
    p.grad = torch.tensor([3.0, float("inf"), 4.0])
    with pytest.raises(RuntimeError, match="is non-finite, so it cannot be clipped"):
        roundel.optim.clip_grad_norm_(p, 1.0, error_if_nonfinite=True)
    assert p.grad.tolist() == [3.0, float("inf"), 4.0]
    assert roundel.optim.clip_grad_norm_(p, 1.0).isinf()
    assert p.grad.isnan().tolist() == [False, True, False]
    p.grad = torch.tensor([3.0, -5.0, 4.0])
    version = p.grad._version
    roundel.optim.clip_grad_norm_([p], 7.0)
    assert p.grad._version > version  # DistributedOptimizer notices changed gradients by it
    p.grad = torch.tensor([3.0, -5.0, 4.0])
    assert roundel.optim.clip_grad_norm_(p, 1.0, norm_type=float("inf")) == 5
    assert p.grad.abs().max() == pytest.approx(1.0)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_within_the_step(groups, max_norm):
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    pieces = [{"params": ours[:2]}, {"params": ours[2:], "lr": 0.02}] if groups == 2 else [{"params": ours}]
    optimizer = roundel.optim.SGD(pieces, lr=0.1, momentum=0.9, max_norm=max_norm)
    expected = torch.optim.SGD([{**g, "params": theirs[:2] if len(g["params"]) == 2 else theirs[2:]} for g in pieces]
                               if groups == 2 else theirs, lr=0.1, momentum=0.9)  # fmt: skip
    for seed in range(4):
        give_gradients(ours, seed)
        give_gradients(theirs, seed)
        norm = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        before = [p.grad.clone() for p in ours]
        optimizer.step()
        expected.step()
        assert optimizer.last_grad_norm == pytest.approx(norm.item(), rel=1e-6)
        assert optimizer.last_step_skipped is False
        assert equal(before, [p.grad for p in ours])  # the gradients themselves stay as they are
    assert all(torch.allclose(p, q, rtol=1e-5, atol=1e-6) for p, q in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_norm_that_is_not_finite_skips_the_step(groups, bad):
    params = parameters(torch.float32)
    pieces = [{"params": params[:2]}, {"params": params[2:], "lr": 0.02}] if groups == 2 else params
    optimizer = roundel.optim.AdamW(pieces, max_norm=1.0, ema_decay=0.5)
    give_gradients(params, 0)
    optimizer.step()
    before, states = copies(params), copy.deepcopy(optimizer.state_dict()["state"])
    params[2].grad[1000] = bad
    optimizer.step()
    assert optimizer.last_step_skipped is True
    assert not math.isfinite(optimizer.last_grad_norm)
    assert equal(before, copies(params))
    for i, state in optimizer.state_dict()["state"].items():
        assert equal(list(state.values()), list(states[i].values()))


def test_no_norm_is_taken_unless_asked_for():
    params = parameters(torch.float32)
    optimizer = roundel.optim.SGD(params, lr=0.1)
    give_gradients(params, 0)
    optimizer.step()
    assert (optimizer.last_grad_norm, optimizer.last_step_skipped) == (None, False)


# ----- loss scaling


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_grad_scaler_of_torch(dtype):
    """Also with float16 gradients, which torch's scaler refuses to unscale for torch's optimizers."""
    params, expected = parameters(dtype), parameters(dtype)
    optimizer = roundel.optim.SGD(params, lr=0.1, momentum=0.5)
    reference = roundel.optim.SGD(expected, lr=0.1, momentum=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for seed in range(4):
        scaler.scale(torch.ones(()))
        scale = scaler.get_scale()
        give_gradients(params, seed, scale)
        if seed == 2:
            params[1].grad[3] = float("nan")
        before, step = copies(params), copies([optimizer.state[p]["step"] for p in params if seed])
        scaler.step(optimizer)
        scaler.update()
        assert optimizer.last_step_skipped is (seed == 2)
        assert scaler.get_scale() == (512 if seed >= 2 else 1024)
        if seed == 2:
            assert equal(before, copies(params)) and equal(step, [optimizer.state[p]["step"] for p in params])
        else:
            give_gradients(expected, seed)
            reference.step()
    assert equal(copies(params), copies(expected))
    assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")


def test_grad_scaler_after_unscale():
    params, expected = parameters(torch.float32), parameters(torch.float32)
    optimizer, reference = roundel.optim.AdamW(params), roundel.optim.AdamW(expected)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    give_gradients(params, 0, 1024.0)
    scaler.unscale_(optimizer)
    roundel.optim.clip_grad_norm_(params, 1.0)
    scaler.step(optimizer)
    give_gradients(expected, 0)
    roundel.optim.clip_grad_norm_(expected, 1.0)
    reference.step()
    assert equal(copies(params), copies(expected))


def torch_optimizer(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.5)


def clipping_optimizer(params):
    return roundel.optim.SGD(params, lr=0.1, momentum=0.5, max_norm=1e9)


def plain_optimizer(params):
    return roundel.optim.SGD(params, lr=0.1, momentum=0.5)


def optimizer_of_two_groups(params):
    return roundel.optim.SGD([{"params": params[:1]}, {"params": params[1:]}], lr=0.1, momentum=0.5)


@pytest.mark.parametrize("make", [torch_optimizer, plain_optimizer, clipping_optimizer, optimizer_of_two_groups])
@pytest.mark.parametrize("unscale", [False, True])
def test_loss_scaler(make, unscale):
    params, expected = parameters(torch.float32), parameters(torch.float32)
    optimizer, reference = make(params), torch_optimizer(expected)
    scaler = roundel.optim.LossScaler(growth_interval=3)
    scales = []
    for seed in range(7):
        scale = scaler.get_scale()
        assert scaler.scale(torch.tensor(2.0)) == 2 * scale
        give_gradients(params, seed, scale)
        if seed == 1:
            params[0].grad[3, 3] = float("-inf")
        before = copies(params)
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        if seed == 1:
            assert equal(before, copies(params))
        else:
            give_gradients(expected, seed)
            reference.step()
    assert scales == [2.0**n for n in (16, 15, 15, 15, 16, 16, 16)]
    assert all(torch.allclose(p, q, rtol=1e-6, atol=1e-7) for p, q in zip(params, expected, strict=True))
    if isinstance(optimizer, roundel.optim.FusedOptimizer):
        assert optimizer.last_grad_norm == pytest.approx(norm_of(expected), rel=1e-6)


def test_loss_scaler_keeps_its_state():
    scaler = roundel.optim.LossScaler(init_scale=8.0, growth_interval=2, min_scale=4.0)
    params = parameters(torch.float32)
    optimizer = roundel.optim.SGD(params, lr=0.1)
    give_gradients(params, 0)
    scaler.step(optimizer)
    scaler.update()
    other = roundel.optim.LossScaler()
    other.load_state_dict(scaler.state_dict())
    theirs = torch.amp.GradScaler("cpu")
    theirs.load_state_dict(scaler.state_dict())
    theirs.scale(torch.ones(()))
    assert theirs.get_scale() == 8
    roundel.optim.LossScaler().load_state_dict(theirs.state_dict())
    for one in (scaler, other):
        one.step(optimizer)
        one.update()
        assert one.get_scale() == 16  # after the second clean step
    for _ in range(3):
        params[0].grad[0, 0] = float("nan")
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 4  # not below min_scale
    scaler.update(new_scale=32)
    assert scaler.get_scale() == 32


def test_loss_scaler_scales_what_it_is_given():
    scaler = roundel.optim.LossScaler(init_scale=4.0)
    one = torch.ones(())
    assert scaler.scale([one, (one, one)]) == [4, (4, 4)]
    with pytest.raises(InvalidArgumentError, match="expected a tensor or an iterable of tensors, got float"):
        scaler.scale(1.0)
    off = roundel.optim.LossScaler(enabled=False)
    assert off.scale(one) is one
    assert (off.get_scale(), off.state_dict(), off.is_enabled()) == (1.0, {}, False)


def test_loss_scaler_misuse():
    scaler = roundel.optim.LossScaler()
    params = parameters(torch.float32)
    optimizer = roundel.optim.SGD(params, lr=0.1)
    give_gradients(params, 0)
    scaler.unscale_(optimizer)
    with pytest.raises(RoundelError, match=r"unscale_\(\) has already been called on this optimizer since the last update"):
        scaler.unscale_(optimizer)
    with pytest.raises(InvalidArgumentError, match="closures are not supported"):
        scaler.step(optimizer, lambda: None)
    with pytest.raises(InvalidArgumentError, match="the state is empty: it was saved with enabled=False"):
        scaler.load_state_dict({})
    for arguments, text in (
        ({"growth_factor": 1.0}, "growth_factor: expected a number above 1, got 1.0"),
        ({"backoff_factor": 1.0}, "backoff_factor: expected a number between 0 and 1, got 1.0"),
        ({"growth_interval": 0}, "growth_interval: expected a whole number from 1 on, got 0"),
        ({"init_scale": 0.5}, "init_scale: expected a finite number from min_scale 1.0 on, got 0.5"),
    ):
        with pytest.raises(InvalidArgumentError, match=text):
            roundel.optim.LossScaler(**arguments)


def test_masters_after_somebody_changed_the_parameters():
    params = parameters(torch.bfloat16)
    optimizer = roundel.optim.SGD(params, lr=0.25, master_weights=True)
    give_gradients(params, 0)
    optimizer.step()
    with torch.no_grad():
        for p in params:
            p.fill_(1.0)
            p.grad.fill_(1.0)
    optimizer.reload_masters()
    optimizer.step()
    assert all((p == 0.75).all() for p in params)
