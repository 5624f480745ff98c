"""A run with lambda = 0 is the run without the plugin, and what trained can be saved afterwards."""

import copy
import gc

import dill
import psutil
import pytest
import torch
from avalanche.checkpointing import maybe_load_checkpoint, save_checkpoint
from avalanche.training.plugins import LwFPlugin
from torch import nn
from torch.nn.utils import parametrizations, prune

from ewc_plugin import DiagonalEWCPlugin
from support.plugin_streams import N_FEATURES, assert_same, benchmark, strategy, train

pytestmark = pytest.mark.filterwarnings("ignore:Cannot locate reference to:Warning")


class Counting(nn.Module):
    """Counts its calls in a buffer, in every mode."""

    def __init__(self):
        super().__init__()
        self.net = network()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.net(x)


class Codebook(nn.Module):
    """Keeps a moving average of its features, in every mode."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(N_FEATURES, 5), nn.Linear(5, 4)
        self.register_buffer("mean", torch.zeros(5))

    def forward(self, x):
        features = self.first(x)
        self.mean = 0.9 * self.mean + 0.1 * features.detach().mean(0)
        return self.second(features.tanh())


class Remembering(nn.Module):
    """Keeps its last features on itself."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(N_FEATURES, 5), nn.Linear(5, 4)

    def forward(self, x):
        features = self.first(x).tanh()
        self.features = features.detach()
        return self.second(features)


def network(*layers):
    return nn.Sequential(nn.Linear(N_FEATURES, 5), *layers, nn.Tanh(), nn.Linear(5, 4))


def batch_norm_in_train_mode():
    model = network(nn.BatchNorm1d(5))
    model[1].eval = lambda: model[1]
    return model


def weight_norm():
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(N_FEATURES, 4)))


def pruned():
    model = network()
    prune.l1_unstructured(model[0], "weight", amount=0.3)
    return model


def dropout():
    return network(nn.Dropout(0.5))


MODELS = {
    "counter": Counting,
    "codebook": Codebook,
    "features kept": Remembering,
    "batch norm": lambda: network(nn.BatchNorm1d(5)),
    "dropout": dropout,
}
OPTIONS = [{}, {"fisher_type": "exact"}, {"fisher_type": "batched"}, {"normalize": "avalanche"}]
BY_STATE = {"weight norm": weight_norm, "pruned": pruned}  # neither is pickled without the plugin


def made(name):
    torch.manual_seed(0)
    return (MODELS | BY_STATE)[name]()


@pytest.mark.parametrize(
    "options",
    [{}, {"fisher_type": "exact"}, {"fisher_type": "batched"}, {"normalize": "avalanche"}],
    ids=str,
)
@pytest.mark.parametrize("name", MODELS)
def test_lambda_zero_is_the_run_without_the_plugin(name, options):
    stream = benchmark(n_experiences=4).train_stream
    ours, naive = made(name), made(name)
    train(strategy(ours, DiagonalEWCPlugin(0, **options)), stream)
    train(strategy(naive), stream)
    assert_same(ours.state_dict(), naive.state_dict())


@pytest.mark.parametrize("name", MODELS)
def test_what_trained_can_be_copied_saved_and_distilled_from(name, tmp_path, monkeypatch):
    monkeypatch.setitem(dill.settings, "byref", True)
    stream = benchmark().train_stream

    def learner_of():
        return strategy(made(name), LwFPlugin(1, 2), DiagonalEWCPlugin(5.0))

    learner = learner_of()
    train(learner, stream[:1])
    assert_same(copy.deepcopy(learner.model).state_dict(), learner.model.state_dict())
    torch.save(learner.model.state_dict(), tmp_path / "state.pt")
    torch.save(learner.model, tmp_path / "model.pt")
    torch.save(learner.plugins[1].state_dict(), tmp_path / "plugin.pt")
    torch.load(tmp_path / "plugin.pt", weights_only=True)
    save_checkpoint(learner, tmp_path / "checkpoint.pt")
    resumed, begun = maybe_load_checkpoint(learner_of(), tmp_path / "checkpoint.pt")
    assert begun == 1
    for each in (resumed, learner):
        torch.manual_seed(3)
        each.train(stream[1])
    assert_same(resumed.model.state_dict(), learner.model.state_dict())


@pytest.mark.parametrize("name", BY_STATE)
def test_reparametrized_models_train_save_and_are_distilled_from(name, tmp_path):
    stream = benchmark().train_stream
    learner = strategy(made(name), LwFPlugin(1, 2), DiagonalEWCPlugin(5.0))
    without = strategy(made(name), DiagonalEWCPlugin(0.0))
    if name == "weight norm":
        train(learner, stream)
    else:  # LwF copies the model, which torch refuses while the mask is applied
        learner.plugins.pop(0)
        train(learner, stream)
    torch.save(learner.model.state_dict(), tmp_path / "state.pt")
    assert_same(train(without, stream), train(strategy(made(name)), stream))


def live_tensor_bytes():
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("options", [{}, {"implicit": True}, {"normalize": "avalanche"}], ids=str)
def test_memory_is_flat_over_many_experiences(options):
    """Beside the run without the plugin; the slow test below takes 200 and the process's memory."""
    experience = benchmark().train_stream[0]
    learner = strategy(made("dropout"), DiagonalEWCPlugin(1e-3, **options))
    for _ in range(3):
        learner.train(experience)
    before = live_tensor_bytes()
    for _ in range(12):
        learner.train(experience)
    assert live_tensor_bytes() <= before


@pytest.mark.slow
def test_memory_of_200_experiences_is_that_of_naive():
    experience = benchmark().train_stream[0]

    def grown(*plugins):
        wide = nn.Sequential(nn.Linear(N_FEATURES, 20_000), nn.ReLU(), nn.Linear(20_000, 4))
        learner = strategy(wide, *plugins, optimizer=torch.optim.SGD, lr=1e-4)
        for _ in range(20):
            learner.train(experience)
        before = psutil.Process().memory_info().rss
        for _ in range(180):
            learner.train(experience)
        return psutil.Process().memory_info().rss - before

    naive = grown()
    # One set of the parameters is 0.9 MB: were one lost per experience, 160 MB would be.
    assert grown(DiagonalEWCPlugin(1e-3)) < max(naive, 0) + 16e6
