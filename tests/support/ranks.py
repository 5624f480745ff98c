"""Two processes on loopback, each with half of the samples, and what a test compares of them.

The processes are spawned, so what they run must be importable by name in a fresh interpreter.
"""

import os
import warnings

import torch
import torch.distributed as dist
from avalanche.training.supervised import Naive
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset

from ewc_plugin import DiagonalEWCPlugin, experience_batches
from ewc_plugin.avalanche.ranks import shard
from support.plugin_streams import N_FEATURES, benchmark, strategy, train

TYPES = ("predicted", "empirical", "exact", "class_mean", "class_mean_empirical")


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
        class_means = DiagonalEWCPlugin(5.0, fisher_type="class_mean_empirical")
        found[f"{n} samples by class"] = class_means.compute_fisher(learner)
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
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # a native thread that still runs would abort an ordinary end of the process
