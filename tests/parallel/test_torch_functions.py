"""Starting from root's state: parameters, optimizer state, objects; and what happens where they cannot be the same."""

from __future__ import annotations

import collections
import threading

import pytest
import roundel
import roundel.torch as hvd
import torch

TEAMS = [("shm", 1), ("shm", 3), ("tcp", 2), ("hosts", 4)]


class Everything(torch.nn.Module):
    """Parameters and buffers of every kind, filled with `value`."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.norm = torch.nn.BatchNorm1d(5)  # num_batches_tracked: a 0-dim int64 buffer
        self.transposed = torch.nn.Parameter(torch.empty(6, 4).t())
        self.scale = torch.nn.Parameter(torch.empty(()))
        self.sixteen_bits = torch.nn.Parameter(torch.empty(7, dtype=torch.bfloat16))
        self.empty = torch.nn.Parameter(torch.empty(0, 3))
        self.frozen = torch.nn.Parameter(torch.empty(3), requires_grad=False)
        self.register_buffer("mask", torch.empty(4, dtype=torch.bool))
        self.register_buffer("counts", torch.empty(2, 2, dtype=torch.int16))
        with torch.no_grad():
            for tensor in self.state_dict().values():
                tensor.fill_(value)


def assert_filled(module: torch.nn.Module, value: float) -> None:
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, torch.full_like(tensor, value)), f"{name}: {tensor}"


def trained(optimizer_class, steps: int, seed: int, **hyper) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    optimizer = optimizer_class(model.parameters(), **hyper)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def assert_same_state(optimizer: torch.optim.Optimizer, expected: torch.optim.Optimizer) -> None:
    mine, other = optimizer.state_dict(), expected.state_dict()
    assert mine["param_groups"] == other["param_groups"]
    assert mine["state"].keys() == other["state"].keys()
    for key, entries in other["state"].items():
        assert mine["state"][key].keys() == entries.keys()
        for name, value in entries.items():
            if isinstance(value, torch.Tensor):
                assert mine["state"][key][name].dtype == value.dtype
                assert torch.equal(mine["state"][key][name], value), f"{key} {name}"
            elif name not in ("old_dirs", "old_stps", "ro", "al"):
                assert mine["state"][key][name] == value, f"{key} {name}"


def test_broadcast_parameters_of_a_state_dict(comm):
    for root in range(comm.size):
        module = Everything(comm.rank)
        strides = [p.stride() for p in module.parameters()]
        hvd.broadcast_parameters(module.state_dict(), root_rank=root)
        assert_filled(module, root)
        assert [p.stride() for p in module.parameters()] == strides


def test_broadcast_parameters_of_pairs(comm):
    module = Everything(comm.rank)
    hvd.broadcast_parameters(module.named_parameters(), root_rank=comm.size - 1)
    assert all(torch.equal(p, torch.full_like(p, comm.size - 1)) for p in module.parameters())
    assert torch.equal(module.counts, torch.full_like(module.counts, comm.rank))  # no parameter
    hvd.broadcast_parameters(list(module.state_dict().items()), root_rank=0)
    assert torch.equal(module.counts, torch.zeros_like(module.counts))


def test_broadcast_parameters_skips_what_is_no_tensor(comm):
    x = torch.tensor([comm.rank])
    hvd.broadcast_parameters({"note": f"of rank {comm.rank}", "x": x, "nothing": None}, root_rank=comm.size - 1)
    assert x == comm.size - 1
    hvd.broadcast_parameters({})


def test_broadcast_parameters_refuses_what_is_no_parameter(comm):
    for wrong in (["weight"], torch.ones(3), 7):
        with pytest.raises(ValueError, match="pairs such as"):
            hvd.broadcast_parameters(wrong)


@pytest.mark.parametrize("what", ["shape", "same count", "dtype", "name", "missing"])
def test_broadcast_parameters_of_different_models_changes_nothing_and_names_the_difference(comm, what):
    if comm.size == 1:
        return
    tensors = {"a": torch.full((2, 3), float(comm.rank)), "b": torch.full((2, 3), float(comm.rank))}
    if comm.rank == comm.size - 1:
        if what == "missing":
            del tensors["b"]
        elif what == "name":
            tensors["c"] = tensors.pop("b")
        elif what == "dtype":
            tensors["b"] = tensors["b"].double()
        else:
            tensors["b"] = tensors["b"].reshape(3, 2) if what == "same count" else torch.full((2, 4), float(comm.rank))
    found = {
        "shape": r"'b' \(float32 of shape \(2, 4\)\)",
        "same count": r"'b' \(float32 of shape \(3, 2\)\)",
        "dtype": r"'b' \(float64 of shape \(2, 3\)\)",
        "name": r"'c' \(float32 of shape \(2, 3\)\)",
        "missing": "nothing more",
    }[what]
    expected = rf"rank 0 has 'b' \(float32 of shape \(2, 3\)\) where rank {comm.size - 1} has {found}"
    with pytest.raises(roundel.MismatchError, match=expected):
        hvd.broadcast_parameters(tensors)
    assert all((t == comm.rank).all() for t in tensors.values())
    x = torch.tensor([comm.rank])
    hvd.broadcast_parameters({"x": x})  # the job goes on
    assert x == 0


OPTIMIZERS = {
    "Adam": (torch.optim.Adam, {"lr": 0.01}),
    "AdamW amsgrad": (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True}),
    "SGD": (torch.optim.SGD, {"lr": 0.01}),
    "SGD momentum": (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9}),
    "RMSprop centered": (torch.optim.RMSprop, {"lr": 0.01, "centered": True}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.01}),
}


@pytest.mark.parametrize("kind", list(OPTIMIZERS))
def test_broadcast_optimizer_state_to_ranks_that_have_none(comm, kind):
    optimizer_class, hyper = OPTIMIZERS[kind]
    for root in {0, comm.size - 1}:
        _, expected = trained(optimizer_class, 3, seed=root, **hyper)
        _, optimizer = trained(optimizer_class, 3 if comm.rank == root else 0, seed=comm.rank, **hyper)
        hvd.broadcast_optimizer_state(optimizer, root_rank=root)
        assert_same_state(optimizer, expected)


def test_broadcast_optimizer_state_replaces_other_state(comm):
    _, expected = trained(torch.optim.Adam, 2, seed=0, lr=0.5, betas=(0.8, 0.9))
    _, optimizer = trained(torch.optim.Adam, 2 + comm.rank, seed=comm.rank, lr=0.5 / (1 + comm.rank), betas=(0.8, 0.9))
    hvd.broadcast_optimizer_state(optimizer)
    assert_same_state(optimizer, expected)


def test_empty_state_of_root_empties_the_others(comm):
    _, optimizer = trained(torch.optim.Adam, 2 if comm.rank else 0, seed=0, lr=0.01 * (comm.rank + 1))
    hvd.broadcast_optimizer_state(optimizer)
    assert optimizer.state_dict()["state"] == {}
    assert optimizer.param_groups[0]["lr"] == 0.01


def test_optimizers_go_on_alike_after_their_state_was_broadcast(comm):
    model, optimizer = trained(torch.optim.Adam, 3 if comm.rank == 0 else 0, seed=comm.rank, lr=0.01)
    hvd.broadcast_parameters(model.state_dict())
    hvd.broadcast_optimizer_state(optimizer)
    twin, twin_optimizer = trained(torch.optim.Adam, 3, seed=0, lr=0.01)
    for net, opt in ((model, optimizer), (twin, twin_optimizer)):
        torch.manual_seed(7)
        opt.zero_grad()
        net(torch.randn(5, 4)).square().sum().backward()
        opt.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_hyper_parameters_follow_root(comm):
    root = comm.size - 1
    layers = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)]
    groups = [{"params": layer.parameters(), "lr": 0.1 * (comm.rank + 1) * (i + 1)} for i, layer in enumerate(layers)]
    optimizer = torch.optim.SGD(groups, momentum=0.5 + 0.01 * comm.rank, nesterov=comm.rank == root)
    hvd.broadcast_optimizer_state(optimizer, root_rank=root)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1 * (root + 1), 0.2 * (root + 1)]
    assert {group["momentum"] for group in optimizer.param_groups} == {0.5 + 0.01 * root}
    assert optimizer.param_groups[1]["nesterov"] is True
    assert optimizer.param_groups[1]["params"][0] is layers[1].weight


def test_learning_rates_that_are_tensors_follow_root(comm):
    layer = torch.nn.Linear(2, 2)
    lr = torch.tensor(0.25) if comm.rank == 0 else torch.tensor(0.5 + comm.rank)
    optimizer = torch.optim.Adam(layer.parameters(), lr=lr)
    hvd.broadcast_optimizer_state(optimizer)
    assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)
    assert optimizer.param_groups[0]["lr"] == torch.tensor(0.25)


def test_state_of_lbfgs_with_its_lists_of_tensors(comm):
    def make(seed: int, steps: int) -> torch.optim.Optimizer:
        torch.manual_seed(seed)
        layer, x = torch.nn.Linear(3, 1), torch.randn(10, 3)
        optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=4)

        def closure():
            optimizer.zero_grad()
            loss = (layer(x) - 1).square().mean()
            loss.backward()
            return loss

        for _ in range(steps):
            optimizer.step(closure)
        return optimizer

    expected = make(0, 2)
    optimizer = make(comm.rank, 2 if comm.rank == 0 else 0)
    hvd.broadcast_optimizer_state(optimizer)
    assert_same_state(optimizer, expected)
    for key in ("old_dirs", "old_stps"):
        ours, theirs = (opt.state_dict()["state"][0][key] for opt in (optimizer, expected))
        assert len(theirs) > 1 and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_broadcast_optimizer_state_of_a_distributed_optimizer(comm):
    _, expected = trained(torch.optim.Adam, 3, seed=0, lr=0.01)
    model, optimizer = trained(torch.optim.Adam, 3 if comm.rank == 0 else 0, seed=comm.rank, lr=0.01)
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
    hvd.broadcast_optimizer_state(optimizer)
    assert_same_state(optimizer, expected)


def test_broadcast_object_from_each_root(comm):
    for root in range(comm.size):
        objects = [
            None,
            "",
            b"",
            [],
            {"epoch": 3, "name": "é" * root, 7: (1.5, None)},
            collections.OrderedDict(a=1),
            {"weights": torch.arange(5), "big": b"x" * 3_000_000},
        ]
        for expected in objects:
            mine = expected if comm.rank == root else ["other", comm.rank]
            got = hvd.broadcast_object(mine, root_rank=root, name="an object")
            assert type(got) is type(expected)
            if isinstance(expected, dict) and "weights" in expected:
                assert got["big"] == expected["big"] and torch.equal(got["weights"], expected["weights"])
            else:
                assert got == expected


def test_root_gets_its_own_object_back(comm):
    mine = [comm.rank]
    assert (hvd.broadcast_object(mine, root_rank=comm.size - 1) is mine) == (comm.rank == comm.size - 1)


def test_an_object_that_root_cannot_pickle_is_an_error_on_every_rank_and_the_job_goes_on(comm):
    with pytest.raises(Exception, match="pickle") as raised:
        hvd.broadcast_object(threading.Lock(), root_rank=0)
    assert isinstance(raised.value, roundel.RoundelError) == (comm.rank != 0)
    assert hvd.broadcast_object(comm.rank, root_rank=0) == 0


def test_functions_of_the_script_travel_where_cloudpickle_is_installed(comm):
    pytest.importorskip("cloudpickle")
    add = hvd.broadcast_object(lambda x: x + 1, root_rank=0)
    assert add(2) == 3


def test_broadcast_object_fn(comm):
    fn = hvd.broadcast_object_fn(root_rank=comm.size - 1, name="fn")
    assert fn({"rank": comm.rank}) == {"rank": comm.size - 1}


def test_allgather_object(comm):
    objects = [{"rank": r, "text": "x" * (r * 1000), "tensor": torch.arange(r)} for r in range(comm.size)]
    for name in (None, "objects of all"):
        got = hvd.allgather_object(objects[comm.rank], name=name)
        assert got[comm.rank] is objects[comm.rank]
        for ours, theirs in zip(got, objects, strict=True):
            assert (ours["rank"], ours["text"]) == (theirs["rank"], theirs["text"])
            assert torch.equal(ours["tensor"], theirs["tensor"])


def test_an_object_that_one_rank_cannot_pickle_is_an_error_on_every_rank_and_the_job_goes_on(comm):
    last = comm.size - 1
    with pytest.raises(Exception, match="pickle") as raised:
        hvd.allgather_object(threading.Lock() if comm.rank == last else 1)
    assert isinstance(raised.value, roundel.RoundelError) == (comm.rank != last)
    assert hvd.allgather_object(comm.rank) == list(range(comm.size))


def test_broadcast_parameters_takes_tensors_without_names_too(comm):
    model = torch.nn.Linear(3, 2)
    for p in model.parameters():
        p.data.fill_(comm.rank)
    hvd.broadcast_parameters(list(model.parameters()), root_rank=comm.size - 1)
    assert all(bool((p == comm.size - 1).all()) for p in model.parameters())


def test_broadcast_parameters_of_a_mapping_in_any_order(comm):
    tensors = {name: torch.tensor([float(comm.rank)]) for name in ("a", "b", "c")[:: 1 if comm.rank else -1]}
    hvd.broadcast_parameters(tensors, root_rank=0)
    assert all(t == 0 for t in tensors.values())
