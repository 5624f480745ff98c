"""Two processes on loopback, each with half of the samples: F, weights and errors."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from ewc_plugin import DiagonalEWCPlugin, FisherType, diagonal_fisher
from ewc_plugin.avalanche import ranks
from ewc_plugin.avalanche.ranks import shard
from support.plugin_streams import train
from support.ranks import TYPES, cases, experiences, learner_of, model, worker

SIZES = [f"{n} samples{how}" for n in (1, 23) for how in ("", " by class")]
CASES = ["weights", *TYPES, *SIZES, "all samples"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
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


def test_samples_without_a_label_have_no_weight_among_the_ranks(monkeypatch):
    found = []
    monkeypatch.setattr(ranks, "mean_over_ranks", lambda share, like: found.append(share()))
    net = torch.nn.Linear(3, 2)
    batches = [(torch.randn(4, 3), torch.tensor([0, -100, 1, -100]))]
    ranks.fisher_over_ranks(
        lambda data: diagonal_fisher(net, data, "empirical"),
        lambda: batches,
        dict(net.named_parameters()),
        max_samples=None,
        fisher_type=FisherType.EMPIRICAL,
    )
    ((_, weight),) = found
    assert weight == 2
