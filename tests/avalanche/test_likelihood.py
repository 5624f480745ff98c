"""What the outputs mean is read off the criterion, before anything is trained, or refused."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from avalanche.benchmarks import benchmark_from_datasets
from avalanche.benchmarks.utils import AvalancheDataset
from avalanche.training.losses import MaskedCrossEntropy
from avalanche.training.supervised import Naive
from torch import nn

from ewc_plugin import DiagonalEWCPlugin, bernoulli_score, diagonal_fisher, gaussian_score
from support.plugin_streams import N_FEATURES, Blobs, assert_same, benchmark, strategy, train
from support.reference import loop_fisher, relative_error

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
IGNORED = 3  # a label, in the tests of `ignore_index`


def network(*last, outputs=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(N_FEATURES, 5), nn.Tanh(), nn.Linear(5, outputs), *last).double()


class Labelled(Blobs):
    """Blobs with targets of any kind, a function of the label."""

    def __init__(self, target, seed):
        super().__init__(24, seed=seed, dtype=torch.float64)
        self.target = target

    def __getitem__(self, index):
        return self.x[index], self.target(int(self.targets[index]))


def stream(target=int):
    datasets = [AvalancheDataset([Labelled(target, seed)]) for seed in range(2)]
    return benchmark_from_datasets(train=datasets).train_stream


def x_of(experience):
    return torch.stack([row[0] for row in experience.dataset.eval()])


def yes_no(label):
    return torch.tensor([label & 1, label >> 1, 1], dtype=torch.float64)


def numbers(label):
    return torch.tensor([label, -label, 1.0], dtype=torch.float64)


def soft(label):
    return F.one_hot(torch.tensor(label), 4).double() * 0.9 + 0.025


class Wrapped(nn.Module):
    def forward(self, outputs, y):
        return 3 * F.cross_entropy(outputs, y, reduction="sum")


class Focal(nn.CrossEntropyLoss):
    """A function of log p(y) alone, that weighs a sample by its own p(y)."""

    def forward(self, outputs, y):
        log_p = outputs.log_softmax(1).gather(1, y[:, None])
        return -((1 - log_p.exp()).square() * log_p).mean()


def rarely_focal(outputs, y):
    """Focal for one class alone."""
    losses = F.cross_entropy(outputs, y, reduction="none")
    return torch.where(y == 3, (1 - (-losses).exp()).square() * losses, losses).mean()


def with_margin(outputs, y):
    return F.cross_entropy(outputs - 0.35 * F.one_hot(y, 4), y)


def generalized(outputs, y):
    return ((1 - outputs.softmax(1).gather(1, y[:, None]) ** 0.7) / 0.7).mean()


def poly_one(outputs, y):
    losses = F.cross_entropy(outputs, y, reduction="none")
    return (losses + 1 - (-losses).exp()).mean()


def bounded(outputs, y):
    return F.cross_entropy(outputs.clamp(-3, 3), y)


def weighted(outputs, y):
    return F.cross_entropy(outputs, y, weight=torch.tensor([1.0, 2, 3, 4]).to(outputs))


class Counting(nn.Module):
    """Cross entropy that counts its calls."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, outputs, y):
        self.calls += 1
        return F.cross_entropy(outputs, y)


def as_lambda(outputs, y):
    return F.cross_entropy(outputs, y)


def one_hot_loss(outputs, y):
    return -(outputs.log_softmax(1) * y).sum(1).mean()


CROSS_ENTROPIES = {
    "module": (nn.CrossEntropyLoss(), int),
    "function": (F.cross_entropy, int),
    "weights": (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2, 3, 4]).double()), int),
    "smoothing": (nn.CrossEntropyLoss(label_smoothing=0.2), int),
    "sum": (nn.CrossEntropyLoss(reduction="sum"), int),
    "probabilities": (nn.CrossEntropyLoss(), soft),
    "wrapped in a module": (Wrapped(), int),
    "wrapped in a function": (as_lambda, int),
    "weighted by a function": (weighted, int),
    "a function with its options": (partial(F.cross_entropy, label_smoothing=0.1), int),
    "own, of one-hot targets": (one_hot_loss, lambda label: F.one_hot(torch.tensor(label), 4)),
}


def fisher_of(model, criterion, experiences, **options):
    plugin = DiagonalEWCPlugin(1.0, **options)
    learner = strategy(model, plugin, criterion=criterion, lr=1e-3)
    train(learner, experiences)
    return plugin.fisher


@pytest.mark.parametrize("kind", ["predicted", "exact"])
@pytest.mark.parametrize("case", CROSS_ENTROPIES)
def test_every_form_of_cross_entropy_is_a_softmax_classifiers(case, kind):
    criterion, target = CROSS_ENTROPIES[case]
    model, experiences = network(), stream(target)
    found = fisher_of(model, criterion, experiences, fisher_type=kind)
    expected = loop_fisher(model, x_of(experiences[1]), None, kind)
    assert relative_error(found, expected) < 1e-9


@pytest.mark.parametrize("criterion", [nn.NLLLoss(), F.nll_loss], ids=["module", "function"])
def test_log_probabilities_are_a_softmax_classifiers(criterion):
    model, experiences = network(nn.LogSoftmax(1)), stream()
    found = fisher_of(model, criterion, experiences, fisher_type="exact")
    expected = loop_fisher(model[:-1], x_of(experiences[1]), None, "exact")
    assert relative_error(found, expected) < 1e-9


@pytest.mark.parametrize("kind", ["predicted", "exact"])
@pytest.mark.parametrize(
    "criterion",
    [
        nn.BCEWithLogitsLoss(),
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor([2.0, 1, 1]).double()),
        F.binary_cross_entropy_with_logits,
    ],
    ids=["module", "weights", "function"],
)
def test_yes_no_labels_have_their_own_likelihood(criterion, kind):
    model, experiences = network(outputs=3), stream(yes_no)
    found = fisher_of(model, criterion, experiences, fisher_type=kind)
    expected = diagonal_fisher(
        model, [(x_of(experiences[1]),)], bernoulli_score, engine="loop", chunk_size=1
    )
    assert relative_error(found, expected) < 1e-9


def sum_of_squares(model, x, variance):
    """E (d log p / d theta)^2 of y ~ N(outputs, variance): sum_d J_d^2 / variance, by a loop."""
    squares = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for sample in x:
        for output in model(sample[None]).reshape(-1):
            grads = torch.autograd.grad(output, list(model.parameters()), retain_graph=True)
            for total, grad in zip(squares.values(), grads, strict=True):
                total += grad.square() / (variance * len(x))
    return squares


@pytest.mark.parametrize(
    ("criterion", "variance"),
    [(nn.MSELoss(), 1.5), (F.mse_loss, 1.5), (nn.MSELoss(reduction="sum"), 0.5)],
    ids=["mean", "function", "sum"],
)
def test_squares_are_a_normal_likelihood_of_the_criterions_variance(criterion, variance):
    model, experiences = network(outputs=3), stream(numbers)
    found = fisher_of(model, criterion, experiences)
    expected = sum_of_squares(model, x_of(experiences[1]), variance)
    assert relative_error(found, expected) < 1e-9


def test_a_regression_with_one_squeezed_output():
    model, experiences = network(nn.Flatten(0), outputs=1), stream(float)
    found = fisher_of(model, nn.MSELoss(), experiences)
    expected = sum_of_squares(model[:-1], x_of(experiences[1]), 0.5)
    assert relative_error(found, expected) < 1e-9


# ---- refused, before the first step


class SecondOfTwo(nn.Module):
    def __init__(self):
        super().__init__()
        self.features, self.head = nn.Linear(N_FEATURES, 4), nn.Linear(4, 4)
        self.double()

    def forward(self, x):
        features = self.features(x)
        return features, self.head(features)


class Sequence(nn.Module):
    """Logits [N, L, C], as a language model's."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(N_FEATURES, 4).double()

    def forward(self, x):
        return self.head(x)[:, None].expand(-1, 2, -1)


class Flattening(Naive):
    """As Avalanche's Hugging Face example computes its loss."""

    def criterion(self):
        labels = self.mb_y[:, None].expand(-1, 2)
        return self._criterion(self.mb_output.flatten(0, 1), labels.reshape(-1))


class OwnMargin(Naive):
    def criterion(self):
        return F.multi_margin_loss(self.mb_output, self.mb_y)


def of_features(output, y):
    return F.cross_entropy(output["features"], y)


class TwoParts(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = network()

    def forward(self, x):
        logits = self.head(x)
        return {"features": logits * 2, "logits": logits}


def ignoring_a_class(outputs, y):
    return F.cross_entropy(outputs, y, ignore_index=2)


REFUSED = {
    "margin": (network, nn.MultiMarginLoss(), {}, int, "`MultiMarginLoss` does not say"),
    "margin's function": (network, F.multi_margin_loss, {}, int, "`multi_margin_loss` does"),
    "absolute differences": (lambda: network(outputs=3), nn.L1Loss(), {}, numbers, "`L1Loss`"),
    "own margin": (network, nn.CrossEntropyLoss(), {"kind": OwnMargin}, int, "does not say"),
    "a function of temperature": (
        network,
        lambda outputs, y: F.cross_entropy(outputs / 2, y),
        {},
        int,
        "does not say what the model's outputs mean",
    ),
    **{
        name: (network, criterion, {}, int, "does not say what the model's outputs mean")
        for name, criterion in {
            "focal": Focal(),
            "focal for one class": rarely_focal,
            "an additive margin": with_margin,
            "generalized cross entropy": generalized,
            "poly": poly_one,
            "bounded outputs": bounded,
        }.items()
    },
    "a class that is ignored": (network, ignoring_a_class, {}, int, "`ignoring_a_class` does"),
    "another part of the output": (TwoParts, of_features, {}, int, "`of_features` does not"),
    "a tuple": (
        SecondOfTwo,
        lambda output, y: F.cross_entropy(output[1], y),
        {},
        int,
        "returns a tuple of 2 items.*Give a `forward`",
    ),
    "no log-probabilities": (network, nn.NLLLoss(), {}, int, "`NLLLoss` takes log-prob"),
    "one logit": (
        lambda: network(nn.Flatten(0), outputs=1),
        lambda outputs, y: F.cross_entropy(outputs[:, None], y * 0),
        {},
        int,
        r"at least 2 classes, got \(8,\)",
    ),
    "sequences": (
        Sequence,
        nn.CrossEntropyLoss(),
        {"kind": Flattening},
        int,
        r"outputs \[N, C\] with at least 2 classes, got \(8, 2, 4\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_certain_is_refused_before_the_first_step(case):
    make, criterion, options, target, message = REFUSED[case]
    model = make()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    learner = strategy(model, DiagonalEWCPlugin(1.0), criterion=criterion, **options)
    with pytest.raises(ValueError, match=message):
        train(learner, stream(target))
    assert_same(before, dict(model.named_parameters()))


@pytest.mark.parametrize("kind", ["empirical", "sampled"])
def test_labels_of_a_softmax_are_refused_for_another_likelihood(kind):
    plugin = DiagonalEWCPlugin(1.0, fisher_type=kind)
    learner = strategy(network(outputs=3), plugin, criterion=nn.BCEWithLogitsLoss())
    with pytest.raises(ValueError, match="'exact', or a score of your own"):
        train(learner, stream(yes_no))


def test_the_remedies_of_a_refusal_work():
    def logits(model, batch):
        return model(batch[0])[1]

    class Second(DiagonalEWCPlugin):
        def forward(self, model, batch):
            return model(batch[0])[1]

    def criterion(output, y):
        return F.cross_entropy(output[1], y)

    experiences = stream()
    for plugin in (Second(1.0), DiagonalEWCPlugin(1.0, fisher_options={"forward": logits})):
        model = SecondOfTwo()
        train(strategy(model, plugin, criterion=criterion), experiences)
        expected = loop_fisher(
            model, x_of(experiences[1]), None, "predicted", lambda m, x: m(x[0])[1]
        )
        assert relative_error(plugin.fisher, expected) < 1e-9
    score = DiagonalEWCPlugin(1.0, fisher_type=gaussian_score)
    train(strategy(network(), score, criterion=nn.MultiMarginLoss()), experiences)
    assert any(bool(f.any()) for f in score.fisher.values())


def test_a_template_that_adds_to_the_criterion_keeps_its_meaning():
    class Regularised(Naive):
        def criterion(self):
            return self._criterion(self.mb_output, self.mb_y) + self.mb_output.square().mean()

    model, experiences, plugin = network(), stream(), DiagonalEWCPlugin(1.0)
    train(strategy(model, plugin, kind=Regularised), experiences)
    expected = loop_fisher(model, x_of(experiences[1]), None, "predicted")
    assert relative_error(plugin.fisher, expected) < 1e-9


def test_a_template_that_runs_the_model_in_its_criterion_runs_as_without_the_plugin():
    """On an adversarial example, which takes a gradient; batch normalisation counts each run."""

    class Adversarial(Naive):
        def criterion(self):
            x = self.mb_x.clone().requires_grad_()
            (g,) = torch.autograd.grad(self._criterion(self.model(x), self.mb_y), x)
            far = self.model(x.detach() + 0.1 * g.sign())
            return self._criterion(self.mb_output, self.mb_y) + self._criterion(far, self.mb_y)

    ours, naive = (nn.Sequential(nn.BatchNorm1d(6), network()).double() for _ in range(2))
    train(strategy(ours, DiagonalEWCPlugin(0), kind=Adversarial), stream())
    train(strategy(naive, kind=Adversarial), stream())
    assert_same(ours.state_dict(), naive.state_dict())


def test_trying_a_criterion_leaves_it_and_the_random_state_as_they_were():
    ours, naive = Counting(), Counting()
    weights = [
        train(strategy(network(), *plugins, criterion=criterion), stream())
        for criterion, plugins in ((ours, [DiagonalEWCPlugin(0)]), (naive, []))
    ]
    assert_same(*weights)
    assert ours.calls == naive.calls == 6


def test_masked_cross_entropy_is_known():
    plugin = DiagonalEWCPlugin(1.0)
    learner = strategy(network(), plugin, criterion=MaskedCrossEntropy(mask="all"))
    train(learner, benchmark(dtype=torch.float64).train_stream)
    assert plugin.penalty.n_experiences == 2


# ---- labels that the criterion ignores


def half_ignored(label):
    return -100 if label % 2 else label


@pytest.mark.parametrize("kind", ["predicted", "empirical", "sampled", "exact", "batched"])
def test_lambda_zero_is_naive_with_half_of_the_labels_ignored(kind):
    ours, naive = network(), network()
    train(strategy(ours, DiagonalEWCPlugin(0, fisher_type=kind)), stream(half_ignored))
    train(strategy(naive), stream(half_ignored))
    assert_same(dict(ours.named_parameters()), dict(naive.named_parameters()))


@pytest.mark.parametrize("kind", ["predicted", "empirical", "exact"])
@pytest.mark.parametrize(
    ("criterion", "target", "ignored"),
    [
        (nn.CrossEntropyLoss(), half_ignored, -100),
        (nn.CrossEntropyLoss(ignore_index=IGNORED), int, IGNORED),
        (as_lambda, half_ignored, -100),
    ],
    ids=["torch's default", "a class", "own function"],
)
def test_samples_whose_label_is_ignored_are_left_out_of_the_fisher(
    criterion, target, ignored, kind
):
    model, experiences = network(), stream(target)
    found = fisher_of(model, criterion, experiences, fisher_type=kind)
    y = torch.tensor([int(row[1]) for row in experiences[1].dataset])
    x = x_of(experiences[1])[y != ignored]
    expected = loop_fisher(model, x, y[y != ignored], kind)
    assert relative_error(found, expected) < 1e-9


# ---- what the model is fed is what the Fisher sees


class Scaled(Naive):
    @property
    def mb_x(self):
        return self.mbatch[0] / 255


class Unpacking(Naive):
    def _unpack_minibatch(self):
        super()._unpack_minibatch()
        self.mbatch[0] = self.mbatch[0] / 255


class Forward(Naive):
    def forward(self):
        return self.model(self.mb_x / 255)


class Output(Naive):
    """Its output, as the criterion reads it, is not what its forward pass returned."""

    @property
    def mb_output(self):
        return self.__dict__["raw"].logits if self.__dict__["raw"] is not None else None

    @mb_output.setter
    def mb_output(self, value):
        self.__dict__["raw"] = value

    def forward(self):
        return SimpleNamespace(logits=self.model(self.mb_x / 255))


@pytest.mark.parametrize("kind", ["predicted", "empirical", "exact"])
@pytest.mark.parametrize("template", [Scaled, Unpacking, Forward, Output])
def test_the_fisher_sees_what_the_template_feeds(template, kind):
    model, experiences = network(), stream()
    plugin = DiagonalEWCPlugin(1.0, fisher_type=kind)
    learner = strategy(model, plugin, kind=template)
    train(learner, experiences)
    y = torch.tensor([int(row[1]) for row in experiences[1].dataset])
    expected = loop_fisher(model, x_of(experiences[1]) / 255, y, kind)
    assert relative_error(plugin.fisher, expected) < 1e-9


def test_what_a_forward_stores_on_its_template_is_put_back():
    class Storing(Naive):
        features = None

        def forward(self):
            self.features = super().forward()
            return self.features

    learner = strategy(network(), DiagonalEWCPlugin(1.0), kind=Storing)
    train(learner, stream())
    assert len(learner.features) == 8  # the last mini-batch of the training
    assert learner.features.detach().numpy().shape == (8, 4)
