"""Values of `diagonal_fisher` against the float64 sample loop. Blind to speed and memory."""

from types import SimpleNamespace

import pytest
import torch
from avalanche.models import MTSimpleMLP, SimpleCNN, SimpleMLP
from avalanche.models.utils import avalanche_forward
from avalanche.training.plugins import EWCPlugin

from ewc_plugin.fisher.diagonal import diagonal_fisher, explain
from support.problems import PROBLEMS
from support.reference import flags, loop_fisher, relative_error

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

KINDS = ["predicted", "empirical", "exact"]


def batches_of(parts, y, size):
    """(parts, y) in batches; the last one may be ragged."""
    return [
        (tuple(part[i : i + size] for part in parts), y[i : i + size])
        for i in range(0, len(y), size)
    ]


def fisher_of(problem, model, parts, y, kind, *, size=3, **options):
    forward = problem.forward or (lambda m, b: m(b[0]))
    return diagonal_fisher(
        model, batches_of(parts, y, size), kind, forward=lambda m, b: forward(m, b[0]), **options
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.id)
def test_fisher_equals_sample_loop(problem, kind):
    model, parts, y = problem.build()
    expected = loop_fisher(model.eval(), parts, y, kind, problem.forward)
    got = fisher_of(problem, model.train(), parts, y, kind, chunk_size=3)
    assert relative_error(got, expected) < 1e-12


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.id)
def test_slowest_engine_is_the_expected_one(problem):
    model, parts, _ = problem.build()
    served = explain(model, parts, forward=problem.forward or (lambda m, b: m(b[0])))
    assert list(served) == [name for name, p in model.named_parameters() if p.requires_grad]
    engines = {s.engine for s in served.values()}
    assert max(engines, key=["rules", "vmap", "loop"].index) == problem.engine, served


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.id)
def test_sampled_fisher_equals_loop_over_the_same_draws(problem):
    model, parts, y = problem.build()
    forward = problem.forward or (lambda m, b: m(b[0]))
    p = forward(model.eval(), parts).softmax(1).detach()
    u = torch.rand(len(y), 3, generator=torch.Generator().manual_seed(5)).double()
    labels = (p.cumsum(1)[:, None, :] <= u[..., None]).sum(2)  # inverse of the distribution
    expected = loop_fisher(model, parts, y, "labels", problem.forward, labels)
    got = fisher_of(
        problem, model, parts, y, "sampled", n_draws=3, generator=torch.Generator().manual_seed(5)
    )
    assert relative_error(got, expected) < 1e-12


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.id)
def test_model_is_left_as_found(problem):
    model, parts, y = problem.build()
    model.train()
    next(model.children(), model).eval()
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    before, trainable = flags(model), [p.requires_grad for p in model.parameters()]
    random_state, values = torch.get_rng_state(), [p.clone() for p in model.parameters()]
    fisher_of(problem, model, parts, y, "sampled")
    assert flags(model) == before
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert torch.equal(torch.get_rng_state(), random_state)
    for p, value in zip(model.parameters(), values, strict=True):
        assert torch.equal(p, value)
        assert torch.equal(p.grad, torch.full_like(p, 3.0))


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("chunk_size", [1, 3, None])
def test_any_split_gives_the_same_sampled_fisher(size, chunk_size):
    problem = PROBLEMS[2]
    model, parts, y = problem.build()
    whole = fisher_of(problem, model, parts, y, "sampled", size=7, n_draws=2)
    split = fisher_of(
        problem, model, parts, y, "sampled", size=size, chunk_size=chunk_size, n_draws=2
    )
    assert relative_error(split, {n: f.double() for n, f in whole.items()}) < 1e-13


def avalanche_mlp():
    return SimpleMLP(num_classes=10, input_size=28 * 28, hidden_size=32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("model", "shape"),
    [(avalanche_mlp, (1, 28, 28)), (lambda: SimpleCNN(num_classes=10), (3, 32, 32))],
    ids=["SimpleMLP", "SimpleCNN"],
)
def test_avalanche_models(model, shape, kind):
    torch.manual_seed(0)
    model = model().double()
    x, y = torch.randn(5, *shape, dtype=torch.float64), torch.arange(5)
    got = diagonal_fisher(model, [(x, y, torch.zeros(5))], kind)
    assert relative_error(got, loop_fisher(model.eval(), x, y, kind)) < 1e-12


@pytest.fixture
def float64_by_default():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tasks", [[1, 1, 1, 1, 1], [1, 0, 1, 1, 0]], ids=["one task", "mixed"])
def test_avalanche_multi_head(kind, tasks, float64_by_default):
    torch.manual_seed(0)
    model = MTSimpleMLP(input_size=8, hidden_size=6)
    for t in (0, 1, 2):
        model.classifier.adaptation(
            SimpleNamespace(classes_in_this_experience=[t, t + 2], task_labels=[t])
        )
    x, tasks = torch.randn(5, 8), torch.tensor(tasks)
    y = tasks + torch.tensor([0, 2, 2, 0, 2])
    got = diagonal_fisher(
        model, [(x, y, tasks)], kind, forward=lambda m, b: avalanche_forward(m, b[0], b[2])
    )
    expected = loop_fisher(
        model.eval(), (x, tasks), y, kind, lambda m, parts: avalanche_forward(m, *parts)
    )
    assert relative_error(got, expected) < 1e-12
    assert got["classifier.classifiers.1.classifier.weight"].any()
    assert not got["classifier.classifiers.2.classifier.weight"].any()


@pytest.mark.parametrize("kind", ["batched", "batched_reversed"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("class_dim", [1, 2])
def test_batched_reads_labels_as_the_other_types_do(class_dim, dtype, kind):
    torch.manual_seed(0)
    model, x = torch.nn.Linear(5, 3).double(), torch.randn(4, 3, 5).double()
    y = torch.randint(3, (4, 3))  # as many positions as classes: `class_dim` is needed
    outputs = model(x).transpose(1, class_dim)
    sign = -1 if kind == "batched_reversed" else 1
    log_p = (sign * outputs).movedim(class_dim, -1).log_softmax(-1)
    loss = -log_p.gather(-1, y[..., None])[y != 0].mean()
    weight, bias = torch.autograd.grad(loss, list(model.parameters()))
    options = {"ignore_index": 0, "forward": lambda m, b: m(b[0]).transpose(1, class_dim)}
    batches = [(x, y.to(dtype))]
    got = diagonal_fisher(model, batches, kind, class_dim=class_dim, **options)
    assert relative_error(got, {"weight": weight.square(), "bias": bias.square()}) < 1e-12
    with pytest.raises(ValueError, match="`class_dim` is needed: axes"):
        diagonal_fisher(model, batches, kind, **options)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("size", [4, 11])
def test_batched_is_avalanches_to_the_bit(reduction, size):
    torch.manual_seed(0)
    model = SimpleMLP(num_classes=4, input_size=8, hidden_size=6)
    x, y = torch.randn(11, 8), torch.arange(11) % 4
    dataset = [(x[i], int(y[i]), 0) for i in range(11)]
    criterion = torch.nn.CrossEntropyLoss(reduction=reduction)
    theirs = EWCPlugin(1.0).compute_importances(
        model, criterion, torch.optim.SGD(model.parameters(), lr=0.1), dataset, "cpu", size
    )
    batches = [(x[i : i + size], y[i : i + size]) for i in range(0, 11, size)]
    ours = diagonal_fisher(model, batches, "batched", criterion=criterion)
    assert list(ours) == list(theirs)
    for name in ours:
        assert torch.equal(ours[name], theirs[name].data)
