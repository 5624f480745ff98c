"""What the penalty copies, refuses and computes for unusual numbers, types and models."""

import copy
import gc
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from ewc_plugin.penalty.implicit_step import implicit_step_
from ewc_plugin.penalty.penalty import QuadraticPenalty
from ewc_plugin.penalty.stability import DivergedError, check_optimizer_state
from support.penalties import model, random_fisher, wander

NAN, INF = float("nan"), float("inf")


def ones(net):
    return {n: torch.ones(p.shape) for n, p in net.named_parameters()}


def consolidated(**options):
    net, penalty = model(), QuadraticPenalty(**options)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        penalty.consolidate(net, random_fisher(net, generator))
        wander(net, generator)
    return net, penalty


@pytest.mark.parametrize(
    "dtype",
    [torch.int32, torch.bool, torch.float16, torch.complex64, torch.float8_e4m3fn, "bfloat16", 3],
)
def test_storage_type_without_the_range_of_float32_is_refused_at_once(dtype):
    with pytest.raises(ValueError, match="`storage_dtype` must be None or one of torch.bfloat16"):
        QuadraticPenalty(storage_dtype=dtype)


@pytest.mark.parametrize("device", ["nope", "meta", "cpu:x", "privateuseone", 1.5])
def test_storage_device_that_cannot_be_used_is_refused_at_once(device):
    with pytest.raises(ValueError, match="`storage_device` is .* Use 'cpu'"):
        QuadraticPenalty(storage_device=device)


@pytest.mark.parametrize("keep_history", [1, "no", None])
def test_keep_history_is_true_or_false(keep_history):
    with pytest.raises(ValueError, match="`keep_history` must be True or False"):
        QuadraticPenalty(keep_history=keep_history)


@pytest.mark.parametrize("normalize", [None, "max"])
def test_nothing_of_the_caller_is_kept(normalize):
    net, penalty = model(), QuadraticPenalty(normalize=normalize, keep_history=True)
    fisher = ones(net)
    penalty.consolidate(net, fisher)
    for f in fisher.values():
        f.zero_()
    for past in penalty.history:
        for f in past.fisher.values():
            f.zero_()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1)
    n = sum(p.numel() for p in net.parameters())
    assert float(penalty(net).detach()) == pytest.approx(n, rel=1e-5)
    state = penalty.state_dict()
    other = QuadraticPenalty(normalize=normalize)
    other.load_state_dict(state)
    for q in state["quadratics"].values():
        q["fisher"].zero_()
    assert float(other(net).detach()) == pytest.approx(n, rel=1e-5)


def spoilt(net, kind):
    fisher = ones(net)
    if kind == "nan weight":
        with torch.no_grad():
            net[2].bias[0] = NAN
    elif kind == "overflow in storage":
        fisher["2.bias"] = torch.full((3,), 1e300, dtype=torch.float64)
    elif kind == "overflow of the sum":
        fisher["2.bias"] = torch.full((3,), 3e38)
    elif kind == "not a tensor":
        fisher["2.bias"] = [1.0, 1.0, 1.0]
    elif kind == "complex":
        fisher["2.bias"] = torch.ones(3, dtype=torch.complex64)
    elif kind == "sparse weight":
        net[2].bias = torch.nn.Parameter(net[2].bias.detach().to_sparse())
    elif kind == "sparse":
        fisher["2.bias"] = torch.ones(3).to_sparse()
    else:
        fisher["2.bias"] = torch.tensor([1.0, {"nan": NAN, "inf": INF, "negative": -1}[kind], 0])
    return fisher


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nan", "must be finite and >= 0"),
        ("inf", "must be finite and >= 0"),
        ("negative", "must be finite and >= 0, got -1"),
        ("nan weight", "`2.bias` is not finite: did the training diverge"),
        ("overflow in storage", "`2.bias` overflows torch.float32.* normalize='mean'"),
        ("overflow of the sum", "`2.bias` overflows torch.float32"),
        ("not a tensor", "must be a dense tensor of real numbers"),
        ("complex", "must be a dense tensor of real numbers"),
        ("sparse weight", "`2.bias` is sparse .*: make it dense"),
        ("sparse", "must be a dense tensor of real numbers"),
    ],
)
def test_consolidate_refuses_and_then_is_as_it_was(kind, message):
    net, penalty = model(), QuadraticPenalty()
    big = ones(net)
    big["2.bias"] = torch.full((3,), 3e38)
    penalty.consolidate(net, big)
    with torch.no_grad():
        net[0].bias += 1
    before = float(penalty(net).detach())
    changed = copy.deepcopy(net)
    with pytest.raises(ValueError, match=message):
        penalty.consolidate(changed, spoilt(changed, kind))
    assert penalty.n_experiences == 1
    assert float(penalty(net).detach()) == before


@pytest.mark.parametrize(
    ("key", "entry", "message"),
    [
        ("fisher", NAN, "is not finite, or its F is negative"),
        ("fisher", -1.0, "is not finite, or its F is negative"),
        ("offset", INF, "is not finite"),
        ("anchor", NAN, "is not finite"),
    ],
)
def test_damaged_state_is_refused_and_nothing_of_it_is_loaded(key, entry, message):
    net, penalty = consolidated()
    state = copy.deepcopy(penalty.state_dict())
    list(state["quadratics"].values())[-1][key][0] = entry
    fresh = QuadraticPenalty()
    with pytest.raises(ValueError, match=message):
        fresh.load_state_dict(state)
    assert fresh.n_experiences == 0
    assert float(fresh(net)) == 0


def test_incomplete_states_are_refused():
    _, penalty = consolidated()
    state = penalty.state_dict()
    with pytest.raises(ValueError, match=r"`state` has no \['quadratics'\]"):
        QuadraticPenalty().load_state_dict({k: v for k, v in state.items() if k != "quadratics"})
    state["quadratics"]["0.bias"].pop("offset")
    with pytest.raises(ValueError, match="written by another version"):
        QuadraticPenalty().load_state_dict(state)


@pytest.mark.parametrize(
    "key, entry, message",
    [
        ("quadratics", {}, "0 quadratics after"),
        ("quadratics", None, "must be a mapping and a list"),
        ("quadratics", 5, "must be a mapping and a list"),
        ("quadratics", {"0.weight": None}, "must be a mapping and a list"),
        ("history", None, "must be a mapping and a list"),
        ("history", [{"fisher": {}}], "must be a mapping and a list"),
        ("n_experiences", 0, "quadratics after 0 experiences"),
    ],
)
def test_state_whose_parts_do_not_fit_is_refused(key, entry, message):
    _, penalty = consolidated()
    with pytest.raises(ValueError, match=message):
        QuadraticPenalty().load_state_dict({**penalty.state_dict(), key: entry})


@pytest.mark.parametrize("scale", [NAN, INF, -1.0, 1e39, 1e308, "10", True, None, 1j])
def test_scale_out_of_range_is_refused_before_gradients_change(scale):
    net, penalty = consolidated()
    with pytest.raises(ValueError, match="`scale` must be"):
        penalty.add_gradient_(net, scale)
    with pytest.raises(ValueError, match="`ewc_lambda` must be"):
        implicit_step_(torch.optim.SGD(net.parameters(), lr=0.1), penalty.pairs(net), scale)
    assert all(p.grad is None for p in net.parameters())


def test_learning_rate_times_lambda_out_of_range_is_refused():
    net, penalty = consolidated()
    with pytest.raises(ValueError, match="`2 lr ewc_lambda` must be at most 1e"):
        implicit_step_(torch.optim.SGD(net.parameters(), lr=100.0), penalty.pairs(net), 1e38)


@pytest.mark.parametrize("decay_factor", [1.1, 1e30, "1", True])
def test_decay_factor_out_of_range(decay_factor):
    with pytest.raises(ValueError, match="`decay_factor` must be"):
        QuadraticPenalty("online", decay_factor)


@pytest.mark.parametrize("normalize", ["mean", "trace", "max"])
@pytest.mark.parametrize("size", [1e-44, 1e-30, 1e30, 3e38])
def test_normalised_penalty_does_not_depend_on_the_size_of_f(normalize, size):
    values = []
    for factor in (1.0, size):
        net, penalty = model(), QuadraticPenalty(normalize=normalize)
        penalty.consolidate(net, {n: factor * f for n, f in ones(net).items()})
        with torch.no_grad():
            net[0].weight += 1
        values.append(float(penalty(net).detach()))
    assert values[1] == pytest.approx(values[0], rel=1e-5)


# ---- types of weights and gradients


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adagrad])
@pytest.mark.parametrize("way", ["loss", "gradient", "implicit"])
def test_sparse_gradients_train_as_dense_ones(way, optimizer):
    weights = []
    for sparse in (True, False):
        torch.manual_seed(0)
        net = nn.Embedding(6, 3, sparse=sparse)
        penalty = QuadraticPenalty()
        penalty.consolidate(net, {"weight": torch.rand(6, 3)})
        with torch.no_grad():
            net.weight += 1
        stepper = optimizer(net.parameters(), lr=0.1)
        stepper.zero_grad()
        loss = net(torch.tensor([1, 1, 4])).square().sum()
        (loss + 0.5 * penalty(net) if way == "loss" else loss).backward()
        if way == "gradient":
            penalty.add_gradient_(net, 0.5)
        stepper.step()
        if way == "implicit":
            implicit_step_(stepper, penalty.pairs(net), 0.5)
        weights.append(net.weight.detach().clone())
    assert torch.allclose(*weights, rtol=1e-6, atol=1e-7)


def test_complex_parameters_have_the_penalty_of_their_two_parts():
    torch.manual_seed(0)
    z = nn.ParameterDict({"w": nn.Parameter(torch.randn(20, dtype=torch.complex128))})
    xy = nn.ParameterDict({"w": nn.Parameter(torch.view_as_real(z["w"].detach()).clone())})
    ours, parts = QuadraticPenalty(), QuadraticPenalty()
    for _ in range(3):
        fisher = torch.rand(20, dtype=torch.float64)
        ours.consolidate(z, {"w": fisher})
        parts.consolidate(xy, {"w": fisher[:, None].expand(20, 2)})
        with torch.no_grad():
            xy["w"] += torch.randn(20, 2)
            z["w"].copy_(torch.view_as_complex(xy["w"].detach()))
    value = ours(z)
    assert float(value.detach()) == pytest.approx(float(parts(xy).detach()), rel=1e-12)
    (expected,) = torch.autograd.grad(parts(xy), [xy["w"]])
    (found,) = torch.autograd.grad(value, [z["w"]])
    assert torch.allclose(torch.view_as_real(found), expected, rtol=1e-12)
    z["w"].grad = torch.zeros_like(z["w"])
    ours.add_gradient_(z, 1.0)
    assert torch.allclose(torch.view_as_real(z["w"].grad), expected, rtol=1e-12)
    for net, penalty in ((z, ours), (xy, parts)):
        implicit_step_(torch.optim.SGD(net.parameters(), lr=0.1), penalty.pairs(net), 2.0)
    assert torch.allclose(torch.view_as_real(z["w"].detach()), xy["w"].detach(), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("way", ["loss", "gradient"])
def test_half_precision_gradient_is_that_of_float32_rounded_once(dtype, way):
    torch.manual_seed(0)
    net = nn.Linear(30, 20, bias=False).to(dtype)
    penalty = QuadraticPenalty()
    F = torch.rand(20, 30)
    anchor = net.weight.detach().float()
    penalty.consolidate(net, {"weight": F})
    with torch.no_grad():
        net.weight += 0.1
    moved = net.weight.detach().float() - anchor
    expected = (2 * 3 * F * moved).to(dtype)
    if way == "loss":
        (3 * penalty(net)).backward()
    else:
        penalty.add_gradient_(net, 3.0)
    assert float(penalty(net).detach()) == pytest.approx(float((F * moved**2).sum()), rel=1e-5)
    assert torch.allclose(
        net.weight.grad.float(), expected.float(), rtol=2 * torch.finfo(dtype).eps
    )


@pytest.mark.parametrize("way", ["loss", "gradient"])
def test_gradient_that_float16_cannot_hold_is_an_error(way):
    net = nn.Linear(3, 2, bias=False).half()
    penalty = QuadraticPenalty()
    penalty.consolidate(net, {"weight": torch.full((2, 3), 100.0)})
    with torch.no_grad():
        net.weight += 1
    net.weight.grad = torch.zeros_like(net.weight)
    with pytest.raises(OverflowError, match="more than float16 can hold"):
        if way == "loss":
            (1e4 * penalty(net)).backward()
        else:
            penalty.add_gradient_(net, 1e4)
    assert bool(torch.isfinite(net.weight.grad).all())


@pytest.mark.parametrize("ewc_lambda", [1e9, 1e37])
def test_implicit_step_is_finite_where_lambda_f_overflows(ewc_lambda):
    net = nn.ParameterList([torch.zeros(20000)])  # in blocks
    penalty = QuadraticPenalty()
    F = torch.full((20000,), 1e30)
    F[0] = 0
    for _ in range(2):
        penalty.consolidate(net, {"0": F})
        with torch.no_grad():
            net[0] += 1
    implicit_step_(torch.optim.SGD(net.parameters(), lr=1.0), penalty.pairs(net), ewc_lambda)
    assert float(net[0][0].detach()) == 2
    assert torch.allclose(net[0][1:].detach(), torch.full((19999,), 0.5))


def test_an_optimizer_may_keep_numbers_beside_its_tensors():
    stepper = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    stepper.state["n_steps"] = 3
    check_optimizer_state(stepper)


@pytest.mark.parametrize("optimizer", [torch.optim.RMSprop, torch.optim.Adam, torch.optim.Adagrad])
def test_second_moments_that_overflow_are_an_error_and_no_silent_standstill(optimizer):
    net = nn.ParameterList([torch.ones(3)])
    penalty = QuadraticPenalty()
    penalty.consolidate(net, {"0": torch.ones(3)})
    with torch.no_grad():
        net[0] += 1
    stepper = optimizer(net.parameters(), lr=1e-3)
    penalty.add_gradient_(net, 10.0)
    stepper.step()
    check_optimizer_state(stepper)
    penalty.add_gradient_(net, 1e25)
    stepper.step()
    with pytest.raises(DivergedError, match=f"of {optimizer.__name__} is not finite.* Lower it"):
        check_optimizer_state(stepper, "Lower it.")


# ---- a function of the parameters


@pytest.mark.parametrize("moved", [True, False])
def test_second_derivatives_include_twice_f(moved):
    net, penalty = consolidated()
    if not moved:
        penalty.consolidate(net, ones(net))  # the point where gradients would be left out
    parameters = list(net.parameters())
    x, y = torch.randn(8, 5), torch.randint(0, 3, (8,))
    directions = [torch.randn_like(p) for p in parameters]

    def product(weight):
        loss = nn.functional.cross_entropy(net(x), y)
        if weight:
            loss = loss + weight * penalty(net)
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        inner = sum((g * v).sum() for g, v in zip(gradients, directions, strict=True))
        return torch.autograd.grad(inner, parameters)

    S = [q.fisher for _, q in penalty.pairs(net)]
    for full, plain, F, v in zip(product(3.0), product(0.0), S, directions, strict=True):
        assert torch.allclose(full - plain, 6 * F * v, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [3, 200])  # side by side, and in blocks
def test_a_first_call_in_inference_mode_leaves_the_penalty_usable(width):
    net = nn.Linear(width, width)
    penalty = QuadraticPenalty()
    penalty.consolidate(net, {name: torch.ones_like(p) for name, p in net.named_parameters()})
    with torch.no_grad():
        net.weight += 1
    with torch.inference_mode():
        assert float(penalty(net)) == pytest.approx(width**2, rel=1e-5)
    penalty.add_gradient_(net, 1.0)
    torch.testing.assert_close(net.weight.grad, torch.full((width, width), 2.0))


def test_reading_changes_nothing():
    net, penalty = consolidated()
    larger = copy.deepcopy(net)
    larger[2] = nn.Linear(4, 7)
    before, state = float(penalty(net).detach()), copy.deepcopy(penalty.state_dict())
    penalty(larger), penalty(copy.deepcopy(net).double()), penalty.add_gradient_(larger, 1.0)
    assert float(penalty(net).detach()) == before
    for name, q in penalty.state_dict()["quadratics"].items():
        for key, value in q.items():
            same = torch.equal if isinstance(value, torch.Tensor) else (lambda a, b: a == b)
            assert same(value, state["quadratics"][name][key])


@pytest.mark.parametrize("how", ["functional_call", "dictionary"])
def test_torch_func_differentiates_it(how):
    net, penalty = consolidated()
    parameters = {n: p.detach() for n, p in net.named_parameters()}

    class Regularized(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = net

        def forward(self):
            return penalty(self)

    whole = Regularized()
    if how == "dictionary":
        gradients = torch.func.grad(penalty)(parameters)
    else:
        named = {f"module.{n}": p for n, p in parameters.items()}
        gradients = torch.func.grad(lambda p: torch.func.functional_call(whole, p, ()))(named)
    expected = torch.autograd.grad(penalty(net), list(net.parameters()))
    for found, right in zip(gradients.values(), expected, strict=True):
        assert torch.allclose(found, right, rtol=1e-6)
    with pytest.raises(ValueError, match="the model's own parameters are constants"):
        torch.func.grad(lambda p: penalty(net) + p["0.bias"].sum())(parameters)


def test_compiled_loss_with_the_penalty_is_the_eager_one():
    net, penalty = consolidated()
    x, y = torch.randn(8, 5), torch.randint(0, 3, (8,))

    def loss():
        return nn.functional.cross_entropy(net(x), y) + 2.0 * penalty(net)

    expected = torch.autograd.grad(loss(), list(net.parameters()))
    found = torch.autograd.grad(
        torch.compile(loss, fullgraph=True, backend="aot_eager")(), list(net.parameters())
    )
    for ours, right in zip(found, expected, strict=True):
        assert torch.allclose(ours, right, rtol=1e-5, atol=1e-7)


def test_autocast_does_not_round_the_penalty():
    net, penalty = consolidated()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = penalty(net)
    assert torch.equal(rounded, penalty(net))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
def test_scripted_model_has_the_penalty_of_the_plain_one():
    net, penalty = consolidated()
    scripted = torch.jit.script(net)
    assert torch.equal(penalty(scripted), penalty(net))
    other = QuadraticPenalty()
    other.consolidate(scripted, ones(net))
    with torch.no_grad():
        net[0].bias += 1
    assert float(other(scripted).detach()) == pytest.approx(4, rel=1e-5)
    other.add_gradient_(scripted, 1.0)
    assert torch.allclose(net[0].bias.grad, torch.full((4,), 2.0), rtol=1e-5)


# ---- memory


def test_copies_take_what_the_penalty_keeps_though_it_came_in_views():
    shelf = torch.rand(1000, 5, 4)
    net, penalty = model(), QuadraticPenalty()
    fisher = {"0.weight": shelf[3].T, "2.bias": torch.ones(1).expand(3)}
    penalty.consolidate(net, fisher)
    penalty.consolidate(net, fisher)
    penalty.add_gradient_(net, 1.0)
    assert len(pickle.dumps(penalty)) < penalty.nbytes + 4000
    assert len(pickle.dumps(penalty.state_dict())) < penalty.nbytes + 4000
    loaded = QuadraticPenalty()
    views = penalty.state_dict()
    views["quadratics"]["0.weight"]["fisher"] = shelf[3].T
    loaded.load_state_dict(views)
    assert len(pickle.dumps(loaded)) < penalty.nbytes + 4000


def test_number_of_tensors_is_the_same_after_200_experiences():
    net, generator = model(), torch.Generator().manual_seed(0)
    penalty = QuadraticPenalty()

    def live():
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    counts = []
    for t in range(200):
        penalty.consolidate(net, random_fisher(net, generator))
        wander(net, generator)
        penalty(net).backward()
        penalty.add_gradient_(net, 0.1)
        if t in (20, 199):
            counts.append(live())
    assert counts[0] == counts[1]


def test_frozen_backbone_takes_no_memory():
    net, penalty = model(), QuadraticPenalty()
    net[0].requires_grad_(False)
    penalty.consolidate(net, {n: f for n, f in ones(net).items() if n.startswith("2.")})
    assert penalty.nbytes == 2 * 4 * (12 + 3)


def test_models_on_the_meta_device_are_refused_in_our_own_words():
    net = model()
    fisher = ones(net)
    penalty = QuadraticPenalty()
    penalty.consolidate(net, fisher)
    before = penalty(net)
    meta = copy.deepcopy(net).to("meta")
    calls = [
        lambda: penalty(meta),
        lambda: penalty.consolidate(meta, fisher),
        lambda: QuadraticPenalty().consolidate(meta, fisher),
        lambda: QuadraticPenalty().consolidate(net, {n: f.to("meta") for n, f in fisher.items()}),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="on the meta device and has no values: load"):
            call()
    assert penalty.n_experiences == 1 and torch.equal(penalty(net), before)


def test_parameters_that_are_split_over_processes_are_refused():
    net, penalty = nn.Sequential(nn.Linear(3, 2)), QuadraticPenalty()
    penalty.consolidate(net, ones(net))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        split = parallelize_module(copy.deepcopy(net), mesh, {"0": ColwiseParallel()})
        for call in (penalty, lambda split: penalty.consolidate(split, ones(net))):
            with pytest.raises(
                ValueError, match="DTensor, split over processes, as FSDP does: use"
            ):
                call(split)
    finally:
        dist.destroy_process_group()
    assert penalty.n_experiences == 1


def at_rest():
    net, penalty = model(), QuadraticPenalty()
    penalty.consolidate(net, ones(net))
    return net, penalty, list(net.parameters())


def test_parameters_at_rest_have_a_gradient_of_zeros_where_it_is_asked_for():
    net, penalty, parameters = at_rest()
    for asked in (parameters, parameters[:1]):
        found = torch.autograd.grad(penalty(net), asked)
        assert all(torch.equal(g, torch.zeros_like(p)) for g, p in zip(found, asked, strict=True))
    copies = {name: 1 * p for name, p in net.named_parameters()}
    found = torch.autograd.grad(penalty(copies), parameters)
    assert not any(g.any() for g in found)


@pytest.mark.parametrize("inputs", [None, slice(0, 1)])
def test_parameters_at_rest_are_left_without_gradient_by_a_backward_pass(inputs):
    net, penalty, parameters = at_rest()
    penalty(net).backward(inputs=inputs and parameters[inputs])
    assert all(p.grad is None for p in parameters)
    with torch.no_grad():
        parameters[0].add_(1)
    penalty(net).backward()
    assert [p.grad is None for p in parameters] == [False] + [True] * (len(parameters) - 1)
