"""What the penalty keeps when models grow, are renamed, moved, frozen, stored and loaded."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ewc_plugin.penalty.penalty import QuadraticPenalty
from support.penalties import Unfolded, gradient_of, model, random_fisher, wander


def ones(net):
    return {name: torch.ones_like(p) for name, p in net.named_parameters()}


def grown(net, n_outputs):
    """The same network with units added to its head."""
    larger = copy.deepcopy(net)
    larger[2] = nn.Linear(4, n_outputs)
    with torch.no_grad():
        larger[2].weight[: net[2].out_features] = net[2].weight
        larger[2].bias[: net[2].out_features] = net[2].bias
    return larger


def test_added_units_are_not_penalised_and_the_others_as_before():
    generator = torch.Generator().manual_seed(0)
    net, penalty = model(), QuadraticPenalty()
    for _ in range(2):
        penalty.consolidate(net, random_fisher(net, generator))
        wander(net, generator)
    before = float(penalty(net).detach())
    larger = grown(net, 7)
    value = penalty(larger)
    assert float(value.detach()) == pytest.approx(before, rel=1e-6)
    value.backward()
    assert torch.count_nonzero(larger[2].weight.grad[3:]) == 0
    assert torch.count_nonzero(larger[2].weight.grad[:3]) > 0


def test_parameters_added_later_start_unpenalised():
    net = model()
    penalty = QuadraticPenalty()
    penalty.consolidate(net, ones(net))
    longer = nn.Sequential(*net, nn.Linear(3, 2))
    with torch.no_grad():
        longer[3].weight += 1
    assert float(penalty(longer).detach()) == 0
    penalty.consolidate(longer, ones(longer))
    with torch.no_grad():
        longer[3].weight += 1
    assert float(penalty(longer).detach()) == pytest.approx(6, rel=1e-5)


def test_shrunk_parameter_is_an_error_with_both_shapes():
    net, penalty = model(), QuadraticPenalty()
    penalty.consolidate(net, ones(net))
    net[2] = nn.Linear(4, 2)
    with pytest.raises(ValueError, match=r"`2.weight` is \(2, 4\) in the model and \(3, 4\)"):
        penalty(net)


def test_missing_parameter_is_an_error_and_not_a_penalty_of_zero():
    net, penalty = model(), QuadraticPenalty()
    penalty.consolidate(net, ones(net))
    with pytest.raises(ValueError, match=r"no parameter \['2.bias', '2.weight'\]"):
        penalty(net[:2])


class Wrapper(nn.Module):
    """Renames parameters as DistributedDataParallel does."""

    def __init__(self, module):
        super().__init__()
        self.module = module


@pytest.mark.parametrize(
    "wrap",
    [
        torch.compile,
        Wrapper,
        lambda net: Wrapper(torch.compile(net)),
        lambda net: nn.Sequential(torch.compile(net[0]), net[1], Wrapper(net[2])),
    ],
    ids=["compiled", "data parallel", "both", "parts"],
)
def test_wrapped_model_has_the_penalty_of_the_plain_one(wrap):
    generator = torch.Generator().manual_seed(0)
    net, penalty = model(), QuadraticPenalty()
    penalty.consolidate(net, random_fisher(net, generator))
    wander(net, generator)
    wrapped = wrap(net)
    assert [n for n, _ in wrapped.named_parameters()] != [n for n, _ in net.named_parameters()]
    assert torch.equal(penalty(wrapped), penalty(net))
    penalty.consolidate(wrapped, ones(wrapped))
    wander(net, generator)
    assert torch.equal(penalty(net), penalty(wrapped))
    assert float(penalty(net).detach()) > 0.1


def test_module_called_module_is_told_from_a_wrapper():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))
            self.module = nn.Linear(2, 2)

    net, penalty = Net(), QuadraticPenalty()
    penalty.consolidate(net, ones(net))
    with torch.no_grad():
        net.weight += 1
        net.module.bias += 2
    assert float(penalty(net).detach()) == pytest.approx(2 * 1 + 2 * 4, rel=1e-6)


def test_model_that_changes_its_precision_keeps_its_penalty():
    generator = torch.Generator().manual_seed(0)
    net, penalty = model().double(), QuadraticPenalty()
    penalty.consolidate(net, random_fisher(net, generator))
    with torch.no_grad():
        net[0].weight += 0.5
    before = float(penalty(net).detach())
    assert float(penalty(net.float()).detach()) == pytest.approx(before, rel=1e-5)
    net.to(torch.bfloat16)
    value = penalty(net)
    assert value.dtype == torch.float32
    assert float(value.detach()) == pytest.approx(before, rel=0.05)
    value.backward()
    assert net[0].weight.grad.dtype == torch.bfloat16


def test_frozen_parameter_keeps_what_it_had_and_unfrozen_it_counts_again():
    net, penalty = model(), QuadraticPenalty()
    penalty.consolidate(net, ones(net))
    net[0].requires_grad_(False)
    with torch.no_grad():
        net[2].bias += 1
    penalty.consolidate(net, {n: f for n, f in ones(net).items() if not n.startswith("0.")})
    net[0].requires_grad_(True)
    with torch.no_grad():
        net[0].bias += 1
        net[2].bias += 1
    # 0.bias: 4 units moved by 1 from one anchor. 2.bias: 3 units at 2 and 1 from two anchors.
    assert float(penalty(net).detach()) == pytest.approx(4 * 1 + 3 * (4 + 1), rel=1e-5)


def test_frozen_parameter_gets_no_gradient():
    net, penalty = model(), QuadraticPenalty()
    penalty.consolidate(net, ones(net))
    with torch.no_grad():
        net[0].bias += 1
        net[2].bias += 1
    net[0].requires_grad_(False)
    penalty.add_gradient_(net, 1.0)
    assert net[0].bias.grad is None
    assert torch.allclose(net[2].bias.grad, torch.full((3,), 2.0))


@pytest.mark.parametrize(
    ("normalize", "statistic"),
    [
        ("mean", lambda f: f.mean()),
        ("trace", lambda f: f.sum()),
        ("max", lambda f: f.max()),
    ],
)
def test_normalisation_divides_each_fisher_by_its_own_statistic(normalize, statistic):
    generator = torch.Generator().manual_seed(0)
    net = model()
    normalized, by_hand = QuadraticPenalty(normalize=normalize), QuadraticPenalty()
    for size in (1.0, 1e4):
        fisher = {n: size * f for n, f in random_fisher(net, generator).items()}
        divisor = statistic(torch.cat([f.flatten() for f in fisher.values()]))
        normalized.consolidate(net, fisher)
        by_hand.consolidate(net, {n: f / divisor for n, f in fisher.items()})
        wander(net, generator)
    expected = float(by_hand(net).detach())
    assert float(normalized(net).detach()) == pytest.approx(expected, rel=1e-5)


def test_history_holds_every_experience():
    generator = torch.Generator().manual_seed(0)
    net = model()
    penalty = QuadraticPenalty("online", 0.5, keep_history=True)
    unfolded = Unfolded()
    for _ in range(3):
        fisher = random_fisher(net, generator)
        penalty.consolidate(net, fisher)
        unfolded.consolidate(net, fisher)
        wander(net, generator)
    assert len(penalty.history) == 3
    for past, term in zip(penalty.history, unfolded.terms, strict=True):
        for name, (fisher, anchor) in term.items():
            assert torch.equal(past.fisher[name].double(), fisher)
            assert torch.equal(past.anchor[name].double(), anchor)


def consolidated(**options):
    generator = torch.Generator().manual_seed(0)
    net, penalty = model(), QuadraticPenalty(**options)
    for _ in range(3):
        penalty.consolidate(net, random_fisher(net, generator))
        wander(net, generator)
    return net, penalty


@pytest.mark.parametrize(
    "options", [{}, {"mode": "online", "decay_factor": 0.9}, {"keep_history": True}]
)
def test_state_survives_weights_only_loading_to_the_last_bit(options):
    net, penalty = consolidated(**options)
    file = io.BytesIO()
    torch.save(penalty.state_dict(), file)
    file.seek(0)
    loaded = QuadraticPenalty(**options)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for other in (loaded, pickle.loads(pickle.dumps(penalty)), copy.deepcopy(penalty)):
        assert torch.equal(other(net), penalty(net))
        assert other.n_experiences == 3
        assert other.nbytes == penalty.nbytes
        assert len(other.history) == len(penalty.history)


def test_state_of_other_settings_is_refused():
    _, penalty = consolidated()
    with pytest.raises(ValueError, match="`mode` of the state is 'separate'"):
        QuadraticPenalty("online", 1.0).load_state_dict(penalty.state_dict())


def test_bfloat16_storage_takes_two_thirds_and_is_off_by_under_a_percent():
    net, exact = consolidated()
    _, rounded = consolidated(storage_dtype=torch.bfloat16)
    assert rounded.nbytes * 3 == exact.nbytes * 2  # 2 + 2 + 4 bytes for 4 + 4 + 4
    expected = float(exact(net).detach())
    assert float(rounded(net).detach()) == pytest.approx(expected, rel=1e-2)
    error = gradient_of(rounded(net), net) - gradient_of(exact(net), net)
    assert float(error.norm() / gradient_of(exact(net), net).norm()) < 1e-2


def test_bfloat16_storage_does_not_pull_at_the_anchor():
    net, penalty = model(), QuadraticPenalty(storage_dtype=torch.bfloat16)
    penalty.consolidate(net, ones(net))
    assert float(penalty(net).detach()) == 0


EVENTS = st.lists(st.sampled_from(["consolidate", "grow", "wander"]), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None)
@given(EVENTS, st.sampled_from([None, 0.0, 0.5, 1.0]), st.integers(0, 1000))
def test_any_sequence_of_consolidations_growth_and_decay(events, decay_factor, seed):
    generator = torch.Generator().manual_seed(seed)
    net = model(seed)
    mode = "separate" if decay_factor is None else "online"
    penalty, unfolded = QuadraticPenalty(mode, decay_factor), Unfolded(decay_factor)
    for event in ["consolidate", *events, "wander"]:
        if event == "wander":
            wander(net, generator)
        elif event == "grow":
            net = grown(net, net[2].out_features + 2)
            unfolded.terms = [padded(term, net) for term in unfolded.terms]
        else:
            fisher = random_fisher(net, generator)
            penalty.consolidate(net, fisher)
            unfolded.consolidate(net, fisher)
    value, exact = unfolded(net)
    assert float(penalty(net).detach()) == pytest.approx(value, rel=1e-5)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    assert float(penalty.add_gradient_(net, scale=1.0)) == pytest.approx(value, rel=1e-5)
    found = torch.cat([p.grad.flatten() for p in net.parameters()]).double()
    assert float((found - exact).norm()) <= 1e-5 * float(exact.norm())


def padded(term, net):
    larger = {}
    for name, parameter in net.named_parameters():
        pair = []
        for tensor in term[name]:
            pair.append(torch.zeros(parameter.shape, dtype=torch.float64))
            pair[-1][tuple(slice(n) for n in tensor.shape)] = tensor
        larger[name] = tuple(pair)
    return larger
