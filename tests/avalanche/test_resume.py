"""A run that was interrupted goes on to the last bit."""

import io
import pickle

import torch

from ewc_plugin import DiagonalEWCPlugin
from support.plugin_streams import assert_same, benchmark, mlp, strategy, train


def learner_with_plugin():
    plugin = DiagonalEWCPlugin(50.0)
    return strategy(mlp(), plugin), plugin


def test_resumed_from_state_dicts():
    stream = benchmark().train_stream
    learner, plugin = learner_with_plugin()
    train(learner, stream[:1])
    file = io.BytesIO()
    state = {
        "model": learner.model.state_dict(),
        "optimizer": learner.optimizer.state_dict(),
        "plugin": plugin.state_dict(),
        "rng": torch.get_rng_state(),
    }
    torch.save(state, file)
    learner.train(stream[1])
    expected = dict(learner.model.named_parameters())

    resumed, plugin = learner_with_plugin()
    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed.model.load_state_dict(state["model"])
    resumed.optimizer.load_state_dict(state["optimizer"])
    # A new strategy throws its optimizer's state away in its first `train()` unless it has this.
    resumed.optimized_param_id = dict(resumed.model.named_parameters())
    plugin.load_state_dict(state["plugin"])
    torch.set_rng_state(state["rng"])
    resumed.train(stream[1])
    assert_same(dict(resumed.model.named_parameters()), expected)
    assert plugin.penalty.n_experiences == 2


def test_resumed_from_a_pickled_strategy():
    stream = benchmark().train_stream
    learner, _ = learner_with_plugin()
    train(learner, stream[:1])
    saved, rng = pickle.dumps(learner), torch.get_rng_state()
    learner.train(stream[1])
    resumed = pickle.loads(saved)
    torch.set_rng_state(rng)
    resumed.train(stream[1])
    assert_same(dict(resumed.model.named_parameters()), dict(learner.model.named_parameters()))
