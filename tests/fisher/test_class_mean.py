"""The class means' squares against a plain loop over single samples."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import ewc_plugin.fisher.class_mean as class_mean
from ewc_plugin import diagonal_fisher
from support.gradients import between_classes, sample_gradients, within_classes
from support.problems import PROBLEMS
from support.reference import relative_error

KINDS = ["class_mean", "class_mean_empirical"]


def labels_of(kind, net, parts, y, forward=None):
    forward = forward or (lambda model, parts: model(parts[0]))
    with torch.no_grad():
        one_by_one = [forward(net, tuple(p[n : n + 1] for p in parts)) for n in range(len(y))]
    return y if kind == "class_mean_empirical" else torch.cat(one_by_one).argmax(1)


def gradients(net, parts, labels, forward=None):
    forward = forward or (lambda model, parts: model(parts[0]))

    def log_p(n):
        logits = forward(net, tuple(part[n : n + 1] for part in parts))
        return logits.log_softmax(1)[0, labels[n]]

    return sample_gradients(net, log_p, len(labels))


def mlp(classes=4, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, classes)).double()


def data(N=60, classes=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(classes, (N,), generator=generator)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.id)
def test_any_model_as_in_the_loop(problem):
    model, parts, y = problem.build()
    model.eval()
    labels = labels_of("class_mean", model, parts, y, problem.forward)
    expected = between_classes(gradients(model, parts, labels, problem.forward), labels)
    batches = [(*(p[i : i + 3] for p in parts), y[i : i + 3]) for i in range(0, len(y), 3)]
    found = diagonal_fisher(
        model, batches, "class_mean", forward=problem.forward, targets=lambda batch: batch[-1]
    )
    assert relative_error(found, expected) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_per_sample_is_between_classes_plus_within(kind):
    net, (x, y) = mlp(), data()
    labels = labels_of(kind, net, (x,), y)
    within = within_classes(gradients(net, (x,), labels), labels)
    per_sample = {"class_mean": "predicted", "class_mean_empirical": "empirical"}[kind]
    whole = diagonal_fisher(net, [(x, y)], per_sample)
    between = diagonal_fisher(net, [(x, y)], kind)
    for name, total in whole.items():
        torch.testing.assert_close(between[name] + within[name], total, rtol=1e-12, atol=1e-16)
        assert bool((within[name] > 0.01 * total).any()), "a test of nothing"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize("size", [1, 7, 60])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_neither_order_nor_batch_size_matter(kind, sort, size, chunk_size, monkeypatch):
    monkeypatch.setattr(class_mean, "_CHUNKS_WAITING", 2)  # classes are computed before they fill
    net, (x, y) = mlp(), data()
    labels = labels_of(kind, net, (x,), y)
    expected = between_classes(gradients(net, (x,), labels), labels)
    order = y.argsort() if sort else torch.randperm(60, generator=torch.Generator().manual_seed(2))
    batches = list(zip(x[order].split(size), y[order].split(size), strict=True))
    found = diagonal_fisher(net, batches, kind, chunk_size=chunk_size)
    assert relative_error(found, expected) < 1e-12


def test_float32():
    net, (x, y) = mlp(), data()
    labels = labels_of("class_mean", net, (x,), y)
    expected = between_classes(gradients(net, (x,), labels), labels)
    found = diagonal_fisher(net.float(), [(x.float(), y)], "class_mean")
    assert relative_error(found, expected) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_does_not_underflow(dtype):
    net, (x, y) = mlp(), data()
    with torch.no_grad():
        net[-1].weight.mul_(12)  # sure of its labels: the scores are small
    expected = diagonal_fisher(net, [(x, y)], "class_mean")
    found = diagonal_fisher(net.to(dtype), [(x.to(dtype), y)], "class_mean")
    assert all(f.dtype == torch.float32 for f in found.values())
    for name, total in expected.items():
        assert 0.3 < float(found[name].sum() / total.sum()) < 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_of_one_sample_each_is_the_per_sample_fisher(kind):
    net, (x, _) = mlp(classes=60), data()
    y = torch.arange(60)
    if kind == "class_mean":
        x = x[:3]
        with torch.no_grad():
            assert net(x).argmax(1).unique().numel() == 3
        y = y[:3]
    per_sample = {"class_mean": "predicted", "class_mean_empirical": "empirical"}[kind]
    expected = diagonal_fisher(net, [(x, y)], per_sample)
    assert relative_error(diagonal_fisher(net, [(x, y)], kind), expected) < 1e-12


def test_no_labels_are_needed_for_predicted_classes():
    net, (x, y) = mlp(), data()
    expected = diagonal_fisher(net, [(x, y)], "class_mean")
    assert relative_error(diagonal_fisher(net, [(x,)], "class_mean"), expected) < 1e-12


@pytest.mark.parametrize("wrong", ["all", "few"])
def test_labels_are_only_a_guess_of_predicted_classes(wrong):
    net, (x, _) = mlp(), data()
    predicted = labels_of("class_mean", net, (x,), x[:, 0])
    guess = (predicted + 1) % 4 if wrong == "all" else predicted.clone()
    guess[:3] = torch.tensor([-100, 17, -1])
    expected = between_classes(gradients(net, (x,), predicted), predicted)
    batches = list(zip(x.split(5), guess.split(5), strict=True))
    found = diagonal_fisher(net, batches, "class_mean", chunk_size=4)
    assert relative_error(found, expected) < 1e-12


def test_masked_classes_are_not_predicted():
    net, (x, y) = mlp(), data()
    active = torch.tensor([True, False, True, False])

    def masked(model, batch):
        return model(batch[0]).masked_fill(~active, -torch.inf)

    labels = labels_of("class_mean", net, (x,), y, masked)
    expected = between_classes(gradients(net, (x,), labels, masked), labels)
    found = diagonal_fisher(net, [(x, y)], "class_mean", forward=masked)
    assert relative_error(found, expected) < 1e-12


def test_ignored_labels_are_left_out():
    net, (x, y) = mlp(), data()
    y[::3] = -100
    kept = y != -100
    expected = diagonal_fisher(net, [(x[kept], y[kept])], "class_mean_empirical")
    found = diagonal_fisher(net, [(x, y)], "class_mean_empirical")
    assert relative_error(found, expected) < 1e-12


def test_a_chunk_that_needs_too_much_memory_is_halved():
    net, (x, y) = mlp(), data()
    expected = diagonal_fisher(net, [(x, y)], "class_mean")

    def forward(model, batch):
        if torch.is_grad_enabled() and len(batch[0]) > 5:
            raise RuntimeError("out of memory, says this test")
        return model(batch[0])

    for batch in ((x, y), (x,)):  # also where the data do not guess the classes
        found = diagonal_fisher(net, [batch], "class_mean", forward=forward)
        assert relative_error(found, expected) < 1e-12


class Normalises(torch.autograd.Function):
    """Its backward pass normalises the gradient of the whole batch."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g / g.norm()


class Normalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x):
        return self.head(Normalises.apply(self.first(x).tanh()))


def clipped():
    net = mlp()
    net[0].weight.register_hook(lambda g: g.clamp(-0.01, 0.01))
    return net


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(6, 5), nn.Linear(5, 4)
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x):
        return self.head(checkpoint(self.first, x * self.scale, use_reentrant=True).tanh())


@pytest.mark.parametrize("make", [Normalised, clipped, Checkpointed])
def test_each_sample_has_the_gradient_of_its_own_backward_pass(make):
    net, (x, y) = make().double(), data()
    sums = {name: torch.zeros(4, *p.shape).double() for name, p in net.named_parameters()}
    for n in range(len(x)):
        net.zero_grad()
        net(x[n : n + 1]).log_softmax(1)[0, y[n]].backward()
        for name, p in net.named_parameters():
            sums[name][y[n]] += p.grad
    expected = {
        name: sum(s[c].square() / (y == c).sum() for c in range(4)) / len(y)
        for name, s in sums.items()
    }
    net.zero_grad()
    found = diagonal_fisher(net, [(x, y)], "class_mean_empirical")
    assert relative_error(found, expected) < 1e-12


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.zeros(3, 6), None, "`batches` must yield"),
        (torch.zeros(3, 6), torch.tensor([0, 4, 1]), r"`targets` must be in \[0, 4\)"),
        (torch.zeros(3, 6), torch.zeros(3), "`targets` must be class indices"),
        (torch.zeros(3, 6), torch.full((3,), -100), "No sample of `batches` has a label"),
        (torch.full((3, 6), torch.nan), torch.tensor([0, 1, 1]), "not finite for sample 0"),
    ],
)
def test_refused(x, y, message):
    with pytest.raises(ValueError, match=message):
        diagonal_fisher(mlp(), [(x.double(), y)], "class_mean_empirical")


def test_where_a_logit_is_not_finite_its_place_in_the_stream_is_named():
    net, (x, y) = mlp(), data()
    x[41] = torch.nan
    with pytest.raises(ValueError, match="not finite for sample 41 of"):
        diagonal_fisher(net, list(zip(x.split(7), y.split(7), strict=True)), "class_mean")


def test_samples_that_interact_are_refused():
    net = nn.Sequential(mlp(), nn.BatchNorm1d(4, track_running_stats=False)).double()
    with pytest.raises(ValueError, match="its samples"):
        diagonal_fisher(net, [data()], "class_mean")


class Gradient(nn.Module):
    """Its outputs are the gradient of an energy, so it has none under `torch.no_grad()`."""

    def __init__(self):
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, x):
        x = x.detach().clone().requires_grad_()
        return torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0][:, :4]


class PaddedWords(nn.Module):
    """An encoder that torch computes otherwise under `torch.no_grad()`: padding then gives 0."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 1), nn.Linear(8, 4)

    def forward(self, x):
        words = x[:, :, None] * torch.ones(8).to(x)
        padding = torch.arange(6) > 2 + x[:, :1].sign()
        return self.head(self.encoder(words, src_key_padding_mask=padding).mean(1))


@pytest.mark.parametrize("make", [Gradient, PaddedWords])
def test_models_that_have_other_outputs_without_gradients(make):
    torch.manual_seed(0)
    net, (x, _) = make().double().eval(), data()
    labels = torch.cat([net(x[n : n + 1]).detach() for n in range(len(x))]).argmax(1)
    expected = between_classes(gradients(net, (x,), labels), labels)
    found = diagonal_fisher(net, [(part,) for part in x.split(7)], "class_mean")
    assert relative_error(found, expected) < 1e-12
