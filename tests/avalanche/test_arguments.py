"""Bad arguments are refused when they are set, in the constructor and later alike."""

import copy
import pickle
from functools import partial

import pytest
import torch

from ewc_plugin import (
    DiagonalEWC,
    DiagonalEWCPlugin,
    QuadraticPenalty,
    bernoulli_score,
    diagonal_fisher,
)
from support.plugin_streams import assert_same, benchmark, mlp, strategy, train

LAMBDAS = [float("nan"), float("inf"), -1, -1e-9, "30", None, True, 1j, [30]]

REFUSED = {
    "no samples": {"fisher_options": {"max_samples": 0}},
    "half a sample": {"fisher_options": {"max_samples": 1.5}},
    "no chunk": {"fisher_options": {"chunk_size": 0}},
    "no engine": {"fisher_options": {"engine": "foo"}},
    "draws of no sample": {"fisher_options": {"n_draws": 5}},
    "no generator": {"fisher_options": {"generator": 5}},
    "no forward": {"fisher_options": {"forward": "model"}},
    "no mapping": {"fisher_options": 5},
    "an unknown option": {"fisher_options": {"max_sample": 5}},
    "labels of batched": {"fisher_type": "batched", "fisher_options": {"ignore_index": 0}},
    "samples of batched": {"fisher_type": "batched", "fisher_options": {"max_samples": 5}},
    "no batches": {"fisher_batches": 3},
    "batches, not a function of them": {"fisher_batches": [(torch.zeros(2, 6), torch.zeros(2))]},
    "implicit": {"implicit": "no"},
    "implicit as a number": {"implicit": 1},
    "history": {"keep_importance_data": "no"},
    "a scale": {"normalize": "sum"},
    "a type": {"fisher_type": "true"},
    "no type": {"fisher_type": None},
    "data": {"fisher_data": "all"},
    "decay without online": {"decay_factor": 0.5},
    "decay": {"mode": "online", "decay_factor": -1},
}


@pytest.mark.parametrize("case", REFUSED)
def test_constructor_refuses(case):
    with pytest.raises((ValueError, TypeError), match=r"`\w+`"):
        DiagonalEWCPlugin(1.0, **REFUSED[case])


def test_an_unknown_normalization_is_told_every_known_one():
    known = "'mean', 'trace', 'max', 'avalanche', got 'median'"
    for kind in (DiagonalEWCPlugin, partial(strategy, mlp(), kind=DiagonalEWC)):
        with pytest.raises(ValueError, match=f"`normalize` must be one of {known}"):
            kind(ewc_lambda=1.0, normalize="median")
    with pytest.raises(ValueError, match="'mean', 'trace', 'max', got 'avalanche'"):
        QuadraticPenalty(normalize="avalanche")


SETTABLE = {"fisher_options", "fisher_batches", "implicit", "fisher_type", "decay_factor"}
SETTABLE |= {"normalize"}
LATER = [case for case, options in REFUSED.items() if len(options) == 1 and SETTABLE & {*options}]


@pytest.mark.parametrize("case", LATER)
def test_assignment_refuses_and_leaves_the_plugin_as_it_was(case):
    plugin = DiagonalEWCPlugin(1.0)
    before = {name: getattr(plugin, name) for name in SETTABLE}
    ((name, value),) = REFUSED[case].items()
    with pytest.raises((ValueError, TypeError), match=r"`\w+`"):
        setattr(plugin, name, value)
    assert {name: getattr(plugin, name) for name in SETTABLE} == before


@pytest.mark.parametrize("value", LAMBDAS)
def test_a_schedule_cannot_turn_the_penalty_off_without_a_word(value):
    plugin = DiagonalEWCPlugin(1.0)
    with pytest.raises(ValueError, match="`ewc_lambda` must be"):
        plugin.ewc_lambda = value
    with pytest.raises(ValueError, match="`ewc_lambda` must be"):
        DiagonalEWCPlugin(value)
    assert plugin.ewc_lambda == 1.0


def test_a_scale_that_is_set_later_is_that_of_later_experiences():
    plugin = DiagonalEWCPlugin(1.0)
    plugin.normalize = "mean"
    model = mlp()
    plugin.consolidate(model, {name: torch.rand_like(p) for name, p in model.named_parameters()})
    (total,) = {float(sum(q.fisher.sum() for _, q in plugin.penalty.pairs(model)))}
    assert total == pytest.approx(sum(p.numel() for p in model.parameters()), rel=1e-5)


def test_a_type_that_does_not_fit_the_options_is_refused():
    plugin = DiagonalEWCPlugin(1.0, fisher_type="sampled", fisher_options={"n_draws": 5})
    with pytest.raises(ValueError, match="`n_draws` enters fisher_type 'sampled' alone"):
        plugin.fisher_type = "exact"
    plugin.fisher_options = None
    plugin.fisher_type = bernoulli_score
    assert plugin.fisher_options == {}


def test_schedules_between_experiences_are_followed():
    stream = benchmark(n_experiences=4, dtype=torch.float64).train_stream
    scheduled = DiagonalEWCPlugin(0.0, "online", 1.0)
    learner = strategy(mlp().double(), scheduled, optimizer=torch.optim.SGD, lr=0.1)
    train(learner, stream[:2])
    scheduled.ewc_lambda, scheduled.decay_factor = 7, 0.5
    resumed = DiagonalEWCPlugin(7.0, "online", 0.5)
    resumed.penalty = copy.deepcopy(scheduled.penalty)
    other = strategy(mlp().double(), resumed, optimizer=torch.optim.SGD, lr=0.1)
    other.model.load_state_dict(learner.model.state_dict())
    assert_same(train(learner, stream[2:]), train(other, stream[2:]))
    assert scheduled.penalty.decay_factor == 0.5
    assert float(scheduled.penalty_loss) > 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_a_copy_keeps_its_arguments_and_their_checks(copied):
    plugin = copied(DiagonalEWCPlugin(3.0, "online", 0.5, fisher_options={"max_samples": 4}))
    assert (plugin.ewc_lambda, plugin.decay_factor) == (3.0, 0.5)
    assert plugin.fisher_options == {"max_samples": 4}
    with pytest.raises(ValueError, match="`ewc_lambda`"):
        plugin.ewc_lambda = -1


@pytest.mark.parametrize("apart", [False, True])
def test_the_same_plugin_twice_is_refused(apart):
    plugin = DiagonalEWCPlugin(1.0)
    learner = strategy(mlp(), plugin, plugin)
    if apart:  # attached again, later
        learner = strategy(mlp(), plugin)
        learner.plugins.append(plugin)
    with pytest.raises(ValueError, match="more than once among the strategy's `plugins`"):
        train(learner, benchmark().train_stream)


def test_two_plugins_add_up():
    stream = benchmark(dtype=torch.float64).train_stream

    def weights(*lambdas):
        plugins = [DiagonalEWCPlugin(ewc_lambda) for ewc_lambda in lambdas]
        learner = strategy(mlp().double(), *plugins, optimizer=torch.optim.SGD, lr=0.1)
        return train(learner, stream)

    one, two = weights(6.0), weights(2.0, 4.0)
    for name, weight in one.items():
        torch.testing.assert_close(weight, two[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,)], ids=["x", "(x,)"])
def test_consolidate_takes_inputs_without_labels(wrap):
    model, x = torch.nn.Linear(4, 3), torch.randn(8, 4)
    plugin = DiagonalEWCPlugin(1.0, fisher_type="exact")
    plugin.consolidate(model, [wrap(x)])
    torch.testing.assert_close(plugin.fisher, dict(diagonal_fisher(model, [x], "exact")))
    with pytest.raises(ValueError, match="targets"):
        DiagonalEWCPlugin(1.0, fisher_type="empirical").consolidate(model, [wrap(x)])


def test_consolidate_refuses_samples_and_an_empty_fisher():
    model = torch.nn.Linear(4, 3)
    samples = torch.utils.data.TensorDataset(torch.randn(8, 4), torch.zeros(8).long())
    with pytest.raises(TypeError, match="single samples: pass DataLoader"):
        DiagonalEWCPlugin(1.0).consolidate(model, samples)
    with pytest.raises(ValueError, match="`fisher` has no entries"):
        DiagonalEWCPlugin(1.0).consolidate(model, {})


@pytest.mark.parametrize("state", [None, {}, QuadraticPenalty().state_dict()], ids=type)
@pytest.mark.parametrize("make", [lambda: DiagonalEWCPlugin(1.0), QuadraticPenalty])
def test_what_is_no_state_of_its_kind_is_refused_in_words(make, state):
    if state and make is QuadraticPenalty:
        state = DiagonalEWCPlugin(1.0).state_dict()
    with pytest.raises(ValueError, match=r"`state` (has no \[|must be what `state_dict\(\)`)"):
        make().load_state_dict(state)
