"""The class means' squares against a plain loop over single samples."""

from itertools import count

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
@pytest.mark.filterwarnings("ignore:Gradients of samples do not add up .*by_freq")
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
    net[0].weight.register_hook(lambda g: g.clamp(-1, 1))  # above what a few samples reach
    return net


class Clips(nn.Module):
    """Clips the gradient of a layer, above what a few samples reach."""

    def __init__(self, limit=0.8):
        super().__init__()
        self.first, self.head = nn.Linear(6, 5), nn.Linear(5, 4)
        self.limit = limit

    def clip(self, g):
        return g * min(1.0, self.limit / float(g.norm()))

    def forward(self, x):
        h = self.first(x).tanh()
        if h.requires_grad:
            h.register_hook(self.clip)
        return self.head(h)


class ClipsBesideAnOutlier(Clips):
    def clip(self, g):
        return super().clip(g) if self.outlier else g

    def forward(self, x):
        self.outlier = bool((x.abs() > 9).any())
        return super().forward(x)


class FixedSize(Clips):
    """Takes batches of 20 samples alone."""

    def forward(self, x):
        return super().forward(x + torch.zeros(20, 6).to(x))


class Words(nn.Module):
    """Gradients of a word are divided by how often it is in the batch: seldom more than once."""

    def __init__(self, module=True):
        super().__init__()
        self.table = nn.Embedding(400, 5, scale_grad_by_freq=module)
        self.head = nn.Linear(5, 4)

    def forward(self, x):
        words = (x * 1e4).long() % 400
        table = nn.functional.embedding(words, self.table.weight, scale_grad_by_freq=True)
        return self.head(table.mean(1).tanh())


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(6, 5), nn.Linear(5, 4)
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x):
        return self.head(checkpoint(self.first, x * self.scale, use_reentrant=True).tanh())


def class_means_of_backward_passes(net, x, y, size=1):
    """Each sample's gradient is that of its own pass, in a batch of `size` copies."""
    sums = {name: torch.zeros(4, *p.shape).double() for name, p in net.named_parameters()}
    for n in range(len(x)):
        net.zero_grad()
        logits = net(x[n : n + 1].expand(size, *x.shape[1:]))[:1]
        logits.log_softmax(1)[0, y[n]].backward()
        for name, p in net.named_parameters():
            sums[name][y[n]] += p.grad
    net.zero_grad()
    return {
        name: sum(s[c].square() / (y == c).sum() for c in range(4)) / len(y)
        for name, s in sums.items()
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [Normalised, clipped, Clips, Words, lambda: Words(module=False)])
def test_each_sample_has_the_gradient_of_its_own_backward_pass(make, kind):
    torch.manual_seed(0)
    net, (x, y) = make().double(), data()
    labels = labels_of(kind, net, (x,), y)
    expected = class_means_of_backward_passes(net, x, labels)
    with pytest.warns(UserWarning, match="do not add up .*goes back alone"):
        found = diagonal_fisher(net, [(x, labels)], kind)
    assert relative_error(found, expected) < 1e-12
    assert relative_error(diagonal_fisher(net, [(x, y)], kind, chunk_size=1), expected) < 1e-12


class ClipsBesideALargeGradient(Clips):
    """One more parameter has a gradient in other units."""

    def __init__(self):
        super().__init__()
        self.drift = nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return super().forward(x) + 1e8 * x[:, :1] * self.drift


def test_a_large_gradient_hides_no_other():
    torch.manual_seed(0)
    net, (x, y) = ClipsBesideALargeGradient(), data()
    expected = class_means_of_backward_passes(net, x.float(), y)
    with pytest.warns(UserWarning, match="do not add up .*goes back alone"):
        found = diagonal_fisher(net, [(x.float(), y)], "class_mean_empirical")
    assert relative_error(found, expected) < 1e-4


def test_a_backward_pass_of_its_own_adds_up():
    net, (x, y) = Checkpointed().double(), data()
    expected = class_means_of_backward_passes(net, x, y)
    found = diagonal_fisher(net, [(x, y)], "class_mean_empirical")
    assert relative_error(found, expected) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_that_do_not_add_up_in_the_loaders_batches(kind):
    torch.manual_seed(0)
    net, (x, y) = FixedSize().double(), data()
    with torch.no_grad():
        logits = torch.cat([net(part) for part in x.split(20)])
    labels = y if kind == "class_mean_empirical" else logits.argmax(1)
    expected = class_means_of_backward_passes(net, x, labels, size=20)
    batches = list(zip(x.split(20), y.split(20), strict=True))
    with pytest.warns(UserWarning, match="do not add up .*goes back alone"):
        found = diagonal_fisher(net, batches, kind)
    assert relative_error(found, expected) < 1e-12
    assert relative_error(diagonal_fisher(net, batches, kind, chunk_size=1), expected) < 1e-12


def test_gradients_that_do_not_add_up_late_are_an_error(monkeypatch):
    watch, calls = class_mean.Auditor.watch, count()
    monkeypatch.setattr(
        class_mean.Auditor,
        "watch",
        lambda self, N, must: watch(self, N, must=must or next(calls) > 5),
    )
    torch.manual_seed(0)
    net, (x, y) = ClipsBesideAnOutlier(limit=0.1).double(), data()
    x[-1, 0] = 10
    with pytest.raises(ValueError, match="after 60 samples, .* do not add up .* chunk_size=1"):
        diagonal_fisher(net, [(x, y)], "class_mean_empirical", chunk_size=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_that_add_up_but_for_rounding(dtype, monkeypatch):
    watch = class_mean.Auditor.watch
    monkeypatch.setattr(
        class_mean.Auditor, "watch", lambda self, N, must: watch(self, N, must=True)
    )
    net, (x, y) = mlp().to(dtype), data(N=4000)
    diagonal_fisher(net, [(x.to(dtype), y)], "class_mean_empirical")


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
