"""Two processes on loopback, each with half of the samples: F, weights and errors."""

import os
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from avalanche.training.supervised import Naive
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset

from ewc_plugin import DiagonalEWCPlugin, experience_batches
from ewc_plugin.avalanche.ranks import shard
from support.plugin_streams import N_FEATURES, benchmark, strategy, train

TYPES = ("predicted", "empirical", "exact")


class InOrder(Naive):
    """Every rank's share of each mini-batch, not shuffled."""

    def make_train_dataloader(self, **kwargs):
        data = Subset(self.adapted_dataset, shard(len(self.adapted_dataset)))
        self.dataloader = DataLoader(data, batch_size=self.train_mb_size)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(N_FEATURES, 5), nn.ReLU(), nn.Linear(5, 4)).double()


def learner_of(plugin, net, **options):
    options = {"kind": InOrder, "optimizer": torch.optim.SGD, "lr": 0.1, **options}
    return strategy(net, plugin, **options)


def experiences():
    return benchmark(dtype=torch.float64).train_stream


def cases(net, **options):
    """What is compared: weights after two experiences, and F in several settings."""
    plugin = DiagonalEWCPlugin(5.0)
    learner = learner_of(plugin, net, **options)
    found = {"weights": train(learner, experiences())}
    found["weights"] = {name.removeprefix("module."): w for name, w in found["weights"].items()}
    learner.experience = experiences()[0]
    for kind in TYPES:
        learner.plugins[0] = DiagonalEWCPlugin(5.0, fisher_type=kind)
        found[kind] = learner.plugins[0].compute_fisher(learner)
    for n in (1, 23):  # an empty share; shares of different size
        learner.experience.dataset = experiences()[0].dataset.subset(range(n))
        found[f"{n} samples"] = plugin.compute_fisher(learner)
    plugin.fisher_options = {"max_samples": 30}  # more than there are
    found["all samples"] = plugin.compute_fisher(learner)
    return found


def failing(learner):
    for x, *labels in experience_batches(learner):
        yield x * (float("nan") if dist.get_rank() == 1 else 1), *labels


def worker(rank, folder):
    warnings.simplefilter("ignore")
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", f"file://{folder}/init", rank=rank, world_size=2)
    found = cases(DistributedDataParallel(model()), train_mb_size=4)
    plugin = DiagonalEWCPlugin(5.0, fisher_batches=failing)
    learner = learner_of(plugin, DistributedDataParallel(model()))
    try:
        train(learner, experiences()[:1])
    except (RuntimeError, ValueError) as error:
        found["error"] = f"{type(error).__name__}: {error}"
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["weights", *TYPES, "1 samples", "23 samples", "all samples"])
def test_two_processes_are_as_one(found, case):
    expected = cases(model())[case]
    for of_rank in found:
        assert of_rank[case].keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(of_rank[case][name], tensor, rtol=1e-11, atol=1e-15)
    for name, tensor in found[0][case].items():
        assert torch.equal(tensor, found[1][case][name]), name


@pytest.mark.slow
def test_the_penalty_took_part(found):
    free = train(learner_of(DiagonalEWCPlugin(0.0), model()), experiences())
    assert any(not torch.allclose(w, free[n], rtol=1e-3) for n, w in found[0]["weights"].items())


@pytest.mark.slow
def test_where_one_rank_fails_all_do(found):
    assert "RuntimeError: The Fisher failed on rank [1]" in found[0]["error"]
    assert "logit that is not finite for sample 0" in found[1]["error"]


def test_a_group_of_one_process_is_no_group(tmp_path):
    expected = cases(model())
    dist.init_process_group("gloo", f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        found = cases(DistributedDataParallel(model()))
    finally:
        dist.destroy_process_group()
    assert list(shard(3)) == [0, 1, 2]
    for case, tensors in expected.items():
        for name, tensor in tensors.items():
            assert torch.equal(found[case][name], tensor), (case, name)
