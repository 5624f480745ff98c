"""Score vectors against the dense softmax covariance. Blind to how they are pulled back."""

import pytest
import torch
from torch import nn

from ewc_plugin import diagonal_fisher
from ewc_plugin.fisher.scores import FisherType, score_vectors


def stacked(scores):
    return torch.stack([scores.vector(s) for s in range(scores.count)], 2)  # [N, C, S]


def covariance(logits):
    """diag(p) - p p^T without its cancellation: p_i (1 - p_i) = p_i sum_{j != i} p_j."""
    p = logits.double().softmax(1)
    products = p[:, :, None] * p[:, None, :]
    off_diagonal = products - torch.diag_embed(products.diagonal(dim1=1, dim2=2))
    return torch.diag_embed(off_diagonal.sum(2)) - off_diagonal


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0, 300.0])
def test_exact_factors_give_the_softmax_covariance(classes, spread):
    generator = torch.Generator().manual_seed(classes)
    logits = spread * torch.randn(6, classes, generator=generator, dtype=torch.float64)
    L = stacked(score_vectors(logits, FisherType.EXACT))
    assert L.size(2) == classes - 1
    torch.testing.assert_close(L @ L.mT, covariance(logits), rtol=1e-12, atol=1e-300)


def test_saturated_float32_keeps_its_digits():
    logits = torch.tensor([[20.0, 0.0, -3.0]])  # 1 - p = 2e-9: below float32's resolution at 1
    L = stacked(score_vectors(logits, FisherType.EXACT))
    torch.testing.assert_close((L @ L.mT).double(), covariance(logits), rtol=1e-5, atol=0)
    v = score_vectors(logits, FisherType.PREDICTED).vector(0)
    p = logits.double().softmax(1)
    torch.testing.assert_close(v[0, 0].double(), p[0, 1] + p[0, 2], rtol=1e-6, atol=0)


@pytest.mark.parametrize("mask", [-1000.0, -torch.inf])
def test_masked_classes_cost_and_weigh_nothing(mask):
    logits = torch.tensor([[1.0, mask, 0.5, mask], [-1.0, mask, 3.0, mask]])
    scores = score_vectors(logits, FisherType.EXACT)
    assert scores.count == 1  # two active classes: one backward
    torch.testing.assert_close(
        stacked(scores)[:, :, 0].square(), covariance(logits).diagonal(dim1=1, dim2=2).float()
    )
    for draws in score_vectors(logits, FisherType.SAMPLED, n_draws=50).vector(0)[:, [1, 3]]:
        assert not draws.any()


def test_many_classes_are_made_one_vector_at_a_time():
    scores = score_vectors(torch.randn(4, 1000), FisherType.EXACT)
    assert scores.count == 999
    assert scores.vector(998).shape == (4, 1000)


def test_empirical_score_is_onehot_minus_p():
    logits, y = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 3, 1, 1, 2])
    v = score_vectors(logits, FisherType.EMPIRICAL, targets=y).vector(0)
    expected = torch.nn.functional.one_hot(y, 4) - logits.softmax(1)
    torch.testing.assert_close(v, expected, rtol=1e-13, atol=1e-15)


def test_sampled_mean_goes_to_the_covariance():
    logits = torch.tensor([[1.0, 0.0, -1.0]], dtype=torch.float64)
    n = 40_000
    generator = torch.Generator().manual_seed(0)
    L = stacked(score_vectors(logits, FisherType.SAMPLED, n_draws=n, generator=generator))
    # Entries of v v^T are bounded by 1, so their mean's standard error is below 1 / sqrt(n).
    torch.testing.assert_close(L @ L.mT, covariance(logits), rtol=0, atol=4 / n**0.5)


def test_equal_draws_share_a_vector():
    logits = torch.tensor([[50.0, 0.0, 0.0], [50.0, 0.0, 0.0]])
    assert score_vectors(logits, FisherType.SAMPLED, n_draws=64).count == 1


@pytest.mark.parametrize(
    ("kind", "message"),
    [("batched", "has no score vectors"), ("empirical", "`targets` are needed")],
)
def test_refused(kind, message):
    with pytest.raises(ValueError, match=message):
        score_vectors(torch.zeros(1, 2), FisherType(kind))


def test_unknown_type_lists_the_allowed_ones():
    with pytest.raises(ValueError, match="'predicted', 'empirical', 'sampled', 'exact', 'batched'"):
        FisherType.parse("true")


def test_the_exact_fisher_of_a_model_that_is_certain_of_one_class_is_zero():
    model = nn.Linear(2, 2)
    model.bias.data = torch.tensor([0.0, -1e6])
    fisher = diagonal_fisher(
        model, [(torch.randn(5, 2), torch.zeros(5, dtype=torch.int64))], "exact"
    )
    assert all(float(F.abs().max()) == 0 for F in fisher.values())
