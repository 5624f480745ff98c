"""Dense outputs, [N, T, V] and [N, C, H, W], against a plain loop over single samples."""

import pytest
import torch
from torch import nn

from ewc_plugin import diagonal_fisher
from support.gradients import mean_square, sample_gradients
from support.reference import relative_error


class Tagger(nn.Module):
    """Logits [N, T, V] of token ids [N, T]."""

    def __init__(self, V=4):
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(11, 5), nn.Linear(5, 6)
        self.head = nn.Linear(6, V)

    def forward(self, input_ids, attention_mask=None):
        h = torch.tanh(self.hidden(self.embedding(input_ids)))
        return self.head(h + h.cumsum(1) / 3)


class Segmenter(nn.Module):
    """Logits [N, C, H, W] of images."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 5, 3, padding=1), nn.Conv2d(5, 3, 3, padding=1)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def built(kind, seed=0):
    torch.manual_seed(seed)
    return kind().double()


def sequences(N=7, T=6, ignored=True):
    g = torch.Generator().manual_seed(1)
    ids, y = torch.randint(11, (N, T), generator=g), torch.randint(4, (N, T), generator=g)
    if ignored:
        y[torch.rand(N, T, generator=g) < 0.3] = -100
        y[2] = -100  # a sample without any label
    return ids, y


def images(N=7):
    g = torch.Generator().manual_seed(2)
    x = torch.randn(N, 2, 5, 4, generator=g, dtype=torch.float64)
    y = torch.randint(3, (N, 5, 4), generator=g)
    y[torch.rand(N, 5, 4, generator=g) < 0.3] = -100
    return x, y


def expected(net, x, counted, label, class_dim=-1):
    """Mean over the samples that count of (d sum_t log p(label_t) / d theta)^2, t in counted."""

    def log_p(n):
        z = net(x[n : n + 1])[0].movedim(class_dim if class_dim < 0 else class_dim - 1, -1)
        chosen = label(n, z.detach())
        picked = z.log_softmax(-1).gather(-1, chosen.clamp(min=0)[..., None])[..., 0]
        return (picked * counted[n]).sum()

    N = int(counted.flatten(1).any(1).sum())
    return mean_square(sample_gradients(net, log_p, len(x)), N)


@pytest.mark.parametrize("engine", ["auto", "vmap", "loop"])
@pytest.mark.parametrize("kind", ["predicted", "empirical"])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_sequences(engine, kind, size):
    net, (ids, y) = built(Tagger), sequences()
    label = (lambda n, z: y[n]) if kind == "empirical" else (lambda n, z: z.argmax(-1))
    want = expected(net, ids, y != -100, label)
    batches = list(zip(ids.split(size), y.split(size), strict=True))
    assert relative_error(diagonal_fisher(net, batches, kind, engine=engine), want) < 1e-12
    found = diagonal_fisher(net.float(), batches, kind, engine=engine)
    assert relative_error(found, want) < 1e-4
    assert found.n_samples == 6


@pytest.mark.parametrize("kind", ["predicted", "empirical", "reversed"])
def test_images(kind):
    net, (x, y) = built(Segmenter), images()
    if kind == "reversed":
        head = lambda x: -net(x)  # noqa: E731
        want = expected(_Of(net, head), x, y != -100, lambda n, z: y[n], class_dim=1)
    else:
        label = (lambda n, z: y[n]) if kind == "empirical" else (lambda n, z: z.argmax(-1))
        want = expected(net, x, y != -100, label, class_dim=1)
    found = diagonal_fisher(net, [(x[:4], y[:4]), (x[4:], y[4:])], kind)
    assert relative_error(found, want) < 1e-12


class _Of:
    """A network's parameters with another forward."""

    def __init__(self, net, forward):
        self.named_parameters, self.forward = net.named_parameters, forward

    def __call__(self, x):
        return self.forward(x)


def test_ragged_lengths_and_padding_are_as_no_padding():
    net, (ids, y) = built(Tagger), sequences(ignored=False)
    lengths = [6, 2, 4, 1, 6, 3, 5]
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    padded = {"input_ids": ids, "attention_mask": mask.long()}
    alone = [{"input_ids": ids[n : n + 1, :k]} for n, k in enumerate(lengths)]
    for kind in ("predicted", "empirical"):
        more = {"labels": y} if kind == "empirical" else {}
        each = [
            one | ({"labels": y[n : n + 1, :k]} if more else {})
            for n, (one, k) in enumerate(zip(alone, lengths, strict=True))
        ]
        want = diagonal_fisher(net, each, kind, class_dim=-1)
        found = diagonal_fisher(net, [padded | more], kind, class_dim=-1)
        assert relative_error(found, want) < 1e-12


def test_exact_is_every_class_at_every_position():
    net, (ids, y) = built(Tagger), sequences(N=4, T=3)
    counted = y != -100
    total = {}
    for t in range(3):
        for c in range(4):

            def log_p(n, t=t, c=c):
                return net(ids[n : n + 1])[0].log_softmax(-1)[t, c] * counted[n, t]

            p = net(ids).softmax(-1)[:, t, c].detach()
            for name, g in sample_gradients(net, log_p, 4).items():
                weight = p.view(-1, *(1,) * (g.dim() - 1))
                total[name] = total.get(name, 0) + (weight * g.square()).sum(0)
    N = int(counted.any(1).sum())
    want = {name: t / N for name, t in total.items()}
    assert relative_error(diagonal_fisher(net, [(ids, y)], "exact"), want) < 1e-12


def test_sampled_goes_to_exact():
    net, (ids, y) = built(Tagger), sequences(N=4, T=3)
    exact = diagonal_fisher(net, [(ids, y)], "exact")
    found = diagonal_fisher(net, [(ids, y)], "sampled", n_draws=4000)
    for name, f in exact.items():
        torch.testing.assert_close(found[name], f, rtol=0.15, atol=0.05 * float(f.max()))


def test_sampled_labels_depend_on_neither_batches_nor_padding():
    net, (ids, y) = built(Tagger), sequences()
    want = diagonal_fisher(net, [(ids, y)], "sampled", n_draws=3)
    longer = nn.functional.pad(y, (0, 2), value=-100)
    batches = list(zip(nn.functional.pad(ids, (0, 2)).split(2), longer.split(2), strict=True))
    found = diagonal_fisher(net, batches, "sampled", n_draws=3)
    assert relative_error(found, want) < 1e-12


def test_the_class_axis_is_found_once():
    net = built(Tagger)
    ids, y = sequences(T=6, ignored=False)
    square = ids[:, :4], y[:, :4]  # as many positions as classes
    with pytest.raises(ValueError, match=r"`class_dim` is needed: axes \[1, 2\] fit"):
        diagonal_fisher(net, [square])
    want = diagonal_fisher(net, [(ids, y), square], class_dim=2)
    assert relative_error(diagonal_fisher(net, [(ids, y), square]), want) < 1e-12


def test_positions_of_the_callers_own():
    net, (ids, y) = built(Tagger), sequences(ignored=False)
    counted = torch.rand(7, 6, generator=torch.Generator().manual_seed(3)) < 0.5
    want = expected(net, ids, counted, lambda n, z: z.argmax(-1))
    found = diagonal_fisher(net, [(ids, y, counted)], positions=lambda batch: batch[2])
    assert relative_error(found, want) < 1e-12


@pytest.mark.parametrize(
    ("batch", "kind", "options", "message"),
    [
        ((torch.zeros(3, 6).long(),), "predicted", {}, "`class_dim` is needed: the outputs"),
        (
            (torch.zeros(3, 6).long(), torch.zeros(3).long()),
            "predicted",
            {},
            "`class_dim` is needed: no axis fits",
        ),
        (
            (torch.zeros(3, 6).long(), torch.eye(4)[:3]),  # probabilities [N, C], not positions
            "predicted",
            {},
            "`class_dim` is needed: .* no integer labels",
        ),
        (
            (torch.zeros(3, 6).long(), torch.zeros(3, 5).long()),
            "predicted",
            {"class_dim": 2},
            r"`targets` must have the shape \(3, 6\)",
        ),
        (
            {"input_ids": torch.zeros(3, 6).long(), "attention_mask": torch.ones(3, 5)},
            "predicted",
            {"class_dim": 2},
            r"`positions` must have the shape \(3, 6\)",
        ),
        (
            (torch.zeros(3, 6).long(), torch.full((3, 6), 4)),
            "empirical",
            {},
            r"`targets` must be in \[0, 4\)",
        ),
        (
            (torch.zeros(3, 6).long(), torch.ones(3, 6).long(), torch.zeros(3, 6).long()),
            "predicted",
            {},
            r"`targets` is needed: items 1 and 2 of a batch",
        ),
        ((torch.zeros(3, 6).long(),), "empirical", {"class_dim": 2}, "`batches` must yield"),
        ((torch.zeros(3, 6).long(),), "predicted", {"class_dim": 0}, "`class_dim` must be an axis"),
        ((torch.zeros(3, 6).long(),), "class_mean", {}, "one label per sample"),
        (
            (torch.zeros(3, 6).long(), torch.full((3, 6), -100)),
            "empirical",
            {},
            "No sample of `batches` has a label",
        ),
        (
            (torch.zeros(3, 700).long(), torch.zeros(3, 700).long()),
            "exact",
            {},
            "would take 2100 backward passes: 3 for each of 700 positions. Use 'sampled'",
        ),
    ],
)
def test_refused(batch, kind, options, message):
    with pytest.raises(ValueError, match=message):
        diagonal_fisher(built(Tagger), [batch], kind, **options)
