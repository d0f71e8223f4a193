"""What scripts do with an optimizer: schedulers, closures, hooks, groups that come and go, frozen parameters, odd layouts."""

from __future__ import annotations

import inspect
import weakref

import pytest
import roundel.optim
import torch
from optim_reference import one_thread  # noqa: F401
from roundel import _core
from roundel.errors import InvalidArgumentError
from torch import nn

IN_TORCH = ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad"]
ALL = [*IN_TORCH, "Lion", "LAMB", "LARS"]


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def backward(net: nn.Module, seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    loss = net(torch.randn(6, 4, generator=random)).square().mean()
    loss.backward()
    return loss


def same(a: nn.Module, b: nn.Module, tolerance: float = 1e-6) -> bool:
    return all(
        torch.allclose(p, q, rtol=tolerance, atol=tolerance) for p, q in zip(a.parameters(), b.parameters(), strict=True)
    )


@pytest.mark.parametrize("name", IN_TORCH)
def test_arguments_are_those_of_torch(name):
    theirs = inspect.signature(getattr(torch.optim, name)).parameters
    ours = inspect.signature(getattr(roundel.optim, name)).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    for key, parameter in theirs.items():
        assert (ours[key].default, ours[key].kind) == (parameter.default, parameter.kind), key


@pytest.mark.parametrize("scheduler", [
    lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.1),
    lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=8),  # changes betas or momentum too
    lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
])  # fmt: skip
@pytest.mark.parametrize(("name", "arguments"), [("SGD", {"momentum": 0.9}), ("AdamW", {})])
@pytest.mark.parametrize("lr", [0.05, torch.tensor(0.05), torch.tensor([0.05])])
def test_schedulers(scheduler, name, arguments, lr):
    nets = model(), model()
    for module, net in zip((torch.optim, roundel.optim), nets, strict=True):
        rate = lr.clone() if isinstance(lr, torch.Tensor) else lr
        optimizer = getattr(module, name)(net.parameters(), lr=rate, **arguments)
        schedule = scheduler(optimizer)
        for seed in range(6):
            optimizer.zero_grad()
            backward(net, seed)
            optimizer.step()
            schedule.step()
    assert same(*nets)


def test_closure_is_called_with_gradients_enabled():
    net = model()
    optimizer = roundel.optim.SGD(net.parameters(), lr=0.1)

    def closure():
        optimizer.zero_grad()
        return backward(net, 0)

    with torch.no_grad():
        losses = [optimizer.step(closure).item() for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]
    assert optimizer.step() is None


def test_hooks_are_called_around_a_step():
    net, seen = model(), []
    optimizer = roundel.optim.Adam(net.parameters())
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(len(o.state)))
    optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(len(o.state)))
    backward(net, 0)
    optimizer.step()
    assert seen == [0, 4]


def test_parameters_without_gradient_are_left_alone():
    nets = model(), model()
    for module, net in zip((torch.optim, roundel.optim), nets, strict=True):
        optimizer = module.AdamW(net.parameters(), lr=0.1)
        for seed in range(5):
            optimizer.zero_grad()
            backward(net, seed)
            if seed % 2:
                net[2].bias.grad = net[0].weight.grad = None
            optimizer.step()
    assert same(*nets)
    assert optimizer.state[net[2].bias]["step"] == 3
    assert optimizer.state[net[2].weight]["step"] == 5


def test_gradients_may_come_in_ever_other_sets():
    """As with experts that take turns: more sets than plans are kept."""
    random = torch.Generator().manual_seed(0)
    ours, theirs = ([nn.Parameter(torch.ones(3)) for _ in range(6)] for _ in range(2))
    optimizers = roundel.optim.AdamW(ours, lr=0.1), torch.optim.AdamW(theirs, lr=0.1)
    for _ in range(2):
        for pattern in range(64):
            grads = [torch.randn(3, generator=random) if pattern >> i & 1 else None for i in range(6)]
            for params, optimizer in zip((ours, theirs), optimizers, strict=True):
                for p, grad in zip(params, grads, strict=True):
                    p.grad = grad
                optimizer.step()
    assert all(torch.allclose(p, q, rtol=1e-5, atol=1e-6) for p, q in zip(ours, theirs, strict=True))
    assert len(optimizers[0]._plans[0]._by_pattern) == roundel.optim.plans.MOST_PATTERNS


def test_groups_can_be_added_and_options_changed_in_mid_training():
    nets = model(), model()
    for module, net in zip((torch.optim, roundel.optim), nets, strict=True):
        optimizer = module.SGD(net[0].parameters(), lr=0.1)
        backward(net, 0)
        optimizer.step()
        optimizer.add_param_group({"params": net[2].parameters(), "lr": 0.01, "momentum": 0.5})
        for seed in range(4):
            optimizer.zero_grad()
            backward(net, seed)
            optimizer.step()
            optimizer.param_groups[0]["momentum"] = 0.9
            optimizer.param_groups[1]["weight_decay"] = 0.1
            optimizer.param_groups[0]["nesterov"] = seed > 1
    assert same(*nets)


def test_nesterov_counts_only_with_momentum():
    nets = model(), model()
    for module, net in zip((torch.optim, roundel.optim), nets, strict=True):
        optimizer = module.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True)
        for seed in range(4):
            optimizer.zero_grad()
            backward(net, seed)
            optimizer.step()
            optimizer.param_groups[0]["momentum"] = 0 if seed < 2 else 0.5
    assert same(*nets)


def test_another_parameter_may_share_the_memory():
    old = nn.Parameter(torch.ones(2))
    optimizer = roundel.optim.SGD([old], lr=0.5)
    old.grad = torch.ones(2)
    optimizer.step()
    new = nn.Parameter(old.data)
    optimizer.param_groups[0]["params"][0] = new
    new.grad = torch.zeros(2)
    optimizer.step()
    assert new.tolist() == [0.5, 0.5]


def test_a_parameter_may_be_replaced_or_moved():
    net, expected = model(), model()
    optimizers = roundel.optim.Adam(net.parameters(), lr=0.1), torch.optim.Adam(expected.parameters(), lr=0.1)
    for seed in range(4):
        for one, optimizer in zip((net, expected), optimizers, strict=True):
            optimizer.zero_grad()
            backward(one, seed)
            optimizer.step()
            if seed == 1:
                one[0].weight.data = one[0].weight.data.clone()  # its memory is another one now
            if seed == 2:
                new = nn.Parameter(one[2].bias.detach() * 2)
                state = optimizer.state.pop(one[2].bias)
                optimizer.state[new] = {k: v * 1 for k, v in state.items()}
                params = optimizer.param_groups[0]["params"]
                params[[p is one[2].bias for p in params].index(True)] = new
                one[2].bias = new
    assert same(net, expected)


@pytest.mark.parametrize("name", ALL)
def test_frozen_parameters_have_no_state(name):
    net = model()
    net[0].requires_grad_(False)
    optimizer = getattr(roundel.optim, name)(net.parameters(), **({"momentum": 0.9} if name == "SGD" else {}))
    before = net[0].weight.clone()
    backward(net, 0)
    optimizer.step()
    assert set(optimizer.state) == set(net[2].parameters())
    assert torch.equal(net[0].weight, before)


def test_parameters_frozen_in_mid_training_can_be_released():
    net = model()
    optimizer = roundel.optim.Adam(net.parameters(), lr=0.1)
    backward(net, 0)
    optimizer.step()
    net[0].requires_grad_(False)
    before = net[0].weight.clone()
    optimizer.zero_grad()
    backward(net, 1)
    optimizer.step()
    assert torch.equal(net[0].weight, before)
    assert optimizer.state[net[0].weight]["step"] == 1  # kept, as torch keeps it
    assert optimizer.release_frozen() == (32 + 8) * 2 * 4 + 2 * 4
    optimizer.zero_grad()
    backward(net, 2)
    optimizer.step()
    assert set(optimizer.state) == set(net[2].parameters())


def test_a_plan_looks_at_its_parameters_gradients():
    class Own(nn.Parameter):
        @property
        def grad(self):
            return self.mine

    params = [nn.Parameter(torch.ones(3)), Own(torch.ones(2))]
    plan = _core.OptimizerPlan("sgd", {}, params, [])
    params[0].grad, params[1].mine = torch.ones(3), torch.ones(2)
    assert list(map(id, plan.gradients(params))) == [id(params[0].grad), id(params[1].mine)]
    assert plan.gradients(params[:1]) is None and plan.gradients(params[::-1]) is None
    params[0].grad = None
    assert plan.gradients(params) is None
    params[0].grad = torch.ones(3)
    params[1].data = torch.ones(2)
    assert plan.gradients(params) is None


@pytest.mark.parametrize("name", ALL)
def test_what_is_frozen_in_mid_training_costs_no_bytes(name):
    net = model()
    options = {"momentum": 0.9} if name in ("SGD", "LARS") else {}
    optimizer = getattr(roundel.optim, name)(net.parameters(), ema_decay=0.9, **options)
    backward(net, 0)
    optimizer.step()
    states = [weakref.ref(t) for p in net[0].parameters() for t in optimizer.state[p].values()]
    net[0].requires_grad_(False)
    optimizer.zero_grad()
    optimizer.release_frozen()
    assert states and not any(state() is not None for state in states)  # now, not at the next step
    backward(net, 1)
    optimizer.step()
    assert set(optimizer.state) == set(net[2].parameters())
    ((batch, _),) = optimizer._plans[0].batches()
    assert batch.plan.count == sum(p.numel() for p in net[2].parameters())  # what a step reads and writes


def test_layouts_of_parameters_and_gradients():
    nets = [nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 3)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    for module, net in zip((torch.optim, roundel.optim), nets, strict=True):
        net.to(memory_format=torch.channels_last)
        net[2].weight = nn.Parameter(net[2].weight.detach().t().contiguous().t())
        optimizer = module.AdamW(net.parameters(), lr=0.1)
        for seed in range(4):
            random = torch.Generator().manual_seed(seed)
            optimizer.zero_grad()
            net(torch.randn(5, 3, 4, 4, generator=random)).square().mean().backward()
            if seed % 2:
                net[0].weight.grad = net[0].weight.grad.contiguous()
                net[2].bias.grad = torch.stack([net[2].bias.grad, net[2].bias.grad], 1)[:, 1]
            optimizer.step()
    assert nets[1][0].weight.is_contiguous(memory_format=torch.channels_last)
    assert same(*nets)


def test_one_optimizer_of_several_dtypes():
    random = torch.Generator().manual_seed(0)
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    start = [torch.randn(9, generator=random).to(dtype) for dtype in dtypes]
    ends = []
    for module in (torch.optim, roundel.optim):
        params = [nn.Parameter(p.clone()) for p in start]
        optimizer = module.SGD(params, lr=0.25, momentum=0.5)
        for _ in range(2):
            for p in params:
                p.grad = p.detach() * 0.5
            optimizer.step()
        ends.append(params)
    for theirs, ours in zip(*ends, strict=True):
        assert torch.allclose(theirs.double(), ours.double(), rtol=3 * torch.finfo(ours.dtype).eps, atol=0)


@pytest.mark.parametrize("takes_lists", [True, False])  # older torch marks one tensor at a time
def test_autograd_notices_a_step_between_forward_and_backward(takes_lists, monkeypatch):
    monkeypatch.setattr(roundel.optim.lists, "_TAKES_LISTS", takes_lists)
    net = model()
    optimizer = roundel.optim.SGD(net.parameters(), lr=0.1)
    backward(net, 0)
    loss = net(torch.ones(1, 4)).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", ALL)
def test_empty_and_missing_gradients(name):
    empty, used = nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.ones(2))
    optimizer = getattr(roundel.optim, name)([empty, used], lr=0.1)
    optimizer.step()
    assert not optimizer.state
    empty.grad, used.grad = torch.zeros(0, 3), torch.ones(2)
    optimizer.step()
    assert (used < 1).all()


@pytest.mark.parametrize(("name", "arguments", "text"), [
    ("SGD", {"lr": -1}, "lr: expected a number from 0 on, got -1.0"),
    ("SGD", {"lr": torch.ones(2)}, "lr: expected a number or a tensor of one element, got one of 2"),
    ("SGD", {"nesterov": True}, "Nesterov momentum requires a momentum and zero dampening"),
    ("SGD", {"momentum": 0.9, "dampening": 0.1, "semantics": "keras"}, "dampening: expected 0 with semantics='keras'"),
    ("Adam", {"betas": (1.0, 0.9)}, r"betas[0]: expected a number from 0 to below 1, got 1.0"),
    ("Adam", {"betas": 0.9}, "betas: expected two numbers, got 0.9"),
    ("Adam", {"eps": float("nan")}, "eps: expected a number from 0 on, got nan"),
    ("Adam", {"semantics": "jax"}, "semantics: expected 'torch' or 'keras', got 'jax'"),
    ("Adam", {"differentiable": True}, "differentiable=True: a fused step cannot be differentiated"),
    ("Adam", {"fused": True, "foreach": True}, "`fused` and `foreach` cannot be `True` together."),
    ("Adam", {"state_dtype": torch.int8}, "state_dtype: expected torch.float32, bfloat16 or float16, got torch.int8"),
    ("Adam", {"ema_decay": 2}, "ema_decay: expected a number from 0 to 1, got 2"),
    ("Adam", {"max_norm": 0}, "max_norm: expected a number above 0, got 0"),
    ("Adagrad", {"lr_decay": 0.1, "semantics": "keras"}, "lr_decay: expected 0 with semantics='keras'"),
    ("LARS", {"momentum": 0, "nesterov": True}, "nesterov=True: expected a momentum above 0, got 0"),
])  # fmt: skip
def test_wrong_arguments(name, arguments, text):
    with pytest.raises(InvalidArgumentError) as caught:
        getattr(roundel.optim, name)([nn.Parameter(torch.zeros(1))], **arguments)
    assert text in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'learning_rate'"):
        roundel.optim.Adam([nn.Parameter(torch.zeros(1))], learning_rate=1)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
def test_numbers_that_are_not_floating_point_are_refused(dtype):
    optimizer = roundel.optim.Adam([nn.Parameter(torch.zeros(1))])
    with pytest.raises(InvalidArgumentError, match=f"got a parameter of {dtype}"):
        optimizer.add_param_group({"params": [torch.zeros(2, dtype=dtype)]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("name", ALL)
def test_sparse_gradients_are_refused_and_nothing_is_changed(name):
    layer, other = nn.Embedding(5, 2, sparse=True), nn.Parameter(torch.ones(3))
    optimizer = getattr(roundel.optim, name)([other, layer.weight])
    before = layer.weight.detach().clone()
    for _ in range(2):
        other.grad = torch.ones(3)
        layer(torch.tensor([1, 3])).sum().backward()
        with pytest.raises(InvalidArgumentError, match="expected dense gradients, got a sparse one of shape"):
            optimizer.step()
    assert torch.equal(layer.weight, before)
    assert torch.equal(other, torch.ones(3))
    layer.weight.grad = layer.weight.grad.to_dense()
    optimizer.step()
    layer.weight.grad = layer.weight.grad.to_sparse()
    with pytest.raises(InvalidArgumentError, match="expected dense gradients, got a sparse one of shape"):
        optimizer.step()
