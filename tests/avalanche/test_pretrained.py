"""A pretrained model is protected before the first experience."""

import pytest
import torch
from torch import nn

from ewc_plugin import DiagonalEWC, DiagonalEWCPlugin, QuadraticPenalty, diagonal_fisher
from support.plugin_streams import (
    N_FEATURES,
    Blobs,
    InTheLoss,
    Tokens,
    assert_same,
    benchmark,
    strategy,
    train,
)
from support.reference import loop_fisher, relative_error


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(N_FEATURES, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def batches():
    data = Blobs(seed=7, dtype=torch.float64)
    return [(data.x[:30], data.targets[:30]), (data.x[30:], data.targets[30:])]


def stream():
    return benchmark(dtype=torch.float64).train_stream


@pytest.mark.parametrize("kind", ["predicted", "empirical", "exact"])
def test_batches_and_their_fisher_protect_alike(kind):
    from_batches, from_fisher = (DiagonalEWCPlugin(9.0, fisher_type=kind) for _ in range(2))
    model = network()
    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    from_batches.consolidate(model, batches())
    from_fisher.consolidate(model, diagonal_fisher(model, batches(), kind))
    assert relative_error(from_batches.fisher, loop_fisher(model, x, y, kind)) < 1e-9
    assert_same(from_batches.fisher, from_fisher.fisher)
    assert from_batches.penalty.n_experiences == from_fisher.penalty.n_experiences == 1


def test_the_first_experience_is_trained_with_the_penalty():
    def run(plugin):
        model = network()
        plugin.consolidate(model, batches())
        learner = strategy(model, plugin, optimizer=torch.optim.SGD, lr=0.1)
        return train(learner, stream()[:1]), plugin

    (ours, plugin), (reference, _), (free, _) = (
        run(make) for make in (DiagonalEWCPlugin(9.0), InTheLoss(9.0), DiagonalEWCPlugin(0))
    )
    assert plugin.penalty.n_experiences == 2
    for name, weight in ours.items():
        torch.testing.assert_close(weight, reference[name], rtol=1e-9, atol=1e-12)
    assert any(not torch.allclose(ours[n], free[n], rtol=1e-3) for n in ours)
    assert_same(free, train(strategy(network(), optimizer=torch.optim.SGD, lr=0.1), stream()[:1]))


def test_mappings_with_labels_are_understood():
    torch.manual_seed(0)
    model = Tokens().double()
    ids = torch.randint(9, (6, 3))
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids).double(),
        "labels": torch.arange(6) % 4,
    }
    plugin = DiagonalEWCPlugin(1.0, fisher_type="empirical")
    plugin.consolidate(model, [batch])
    parts = (batch["input_ids"], batch["attention_mask"])
    expected = loop_fisher(model, parts, batch["labels"], "empirical", lambda m, p: m(*p).logits)
    assert relative_error(plugin.fisher, expected) < 1e-9


def test_arguments_that_change_places_are_refused():
    model, fisher = network(), {"weight": torch.ones(2)}
    for pair in ((batches(), model), (fisher, model), (model, model)):
        with pytest.raises(TypeError, match=r"`consolidate\(model, batches_or_fisher\)` takes an"):
            DiagonalEWCPlugin(1.0).consolidate(*pair)
    for pair in ((fisher, model), (model, model), (model, [fisher])):
        with pytest.raises(TypeError, match=r"`consolidate\(model, fisher\)` takes an nn.Module"):
            QuadraticPenalty().consolidate(*pair)


def test_what_does_not_fit_is_refused_and_nothing_is_remembered():
    plugin, model = DiagonalEWCPlugin(1.0), network()
    with pytest.raises(ValueError, match="`fisher` has 'weight'; the model has"):
        plugin.consolidate(model, {"weight": torch.ones(2)})
    with pytest.raises(ValueError, match="`batches` is empty"):
        plugin.consolidate(model, [])
    assert plugin.penalty.n_experiences == 0
    assert plugin.fisher == {}
    learner = strategy(model, kind=DiagonalEWC, ewc_lambda=1.0)
    with pytest.raises(ValueError, match="Make the plugin with another `normalize`"):
        learner.plugins[0].consolidate(model, batches())
