"""Every kind of model: F is the sample loop's, and the weights those of the penalty in the loss."""

from types import SimpleNamespace

import pytest
import torch
from avalanche.benchmarks import dataset_benchmark
from avalanche.benchmarks.utils.classification_dataset import (
    _make_taskaware_tensor_classification_dataset as task_aware_dataset,
)
from avalanche.models import (
    IncrementalClassifier,
    MTSimpleCNN,
    MTSimpleMLP,
    MultiHeadClassifier,
    MultiTaskModule,
    SimpleCNN,
    SimpleMLP,
    avalanche_forward,
)
from avalanche.training.losses import MaskedCrossEntropy
from torch import nn

from ewc_plugin import DiagonalEWCPlugin
from support.plugin_streams import N_FEATURES, Blobs, InTheLoss, benchmark, strategy, train
from support.reference import loop_fisher, relative_error


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)  # `MultiTaskModule` makes its outputs in the default
    yield
    torch.set_default_dtype(torch.float32)


class Images(nn.Module):
    """Points as small images for a CNN."""

    def __init__(self, cnn):
        super().__init__()
        self.cnn = cnn

    def forward(self, x):
        return self.cnn(as_images(x))


class TaskImages(MTSimpleCNN):
    def forward(self, x, task_labels):
        return super().forward(as_images(x), task_labels)


def as_images(x):
    return (x[:, :3, None, None] * torch.linspace(-1, 1, 256).view(16, 16)).sin()


class Growing(nn.Module):
    def __init__(self, masking):
        super().__init__()
        self.features = nn.Linear(N_FEATURES, 5)
        self.head = IncrementalClassifier(5, masking=masking)

    def forward(self, x):
        return self.head(self.features(x).relu())


class HeadsFirst(MultiTaskModule):
    """Heads, of as many units as their task has classes, declared before the backbone."""

    def __init__(self, masking=False):
        super().__init__()
        self.head = MultiHeadClassifier(5, initial_out_features=2, masking=masking)
        self.features = nn.Linear(N_FEATURES, 5)

    def forward(self, x, task_labels):
        return self.head(self.features(x).relu(), task_labels)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(2, 4, batch_first=True)
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        return self.head(self.gru(x.view(-1, 3, 2))[0][:, -1])


class LowRank(nn.Module):
    """A frozen linear layer with a trainable correction, as LoRA has it."""

    def __init__(self, layer, rank=2):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)

    def forward(self, x):
        return self.layer(x) + 0.5 * self.up(self.down(x))


class Returning(nn.Module):
    """Logits among other outputs."""

    def __init__(self, wrap):
        super().__init__()
        self.features = nn.Linear(N_FEATURES, 5)
        self.head = nn.Linear(5, 4)
        self.wrap = wrap

    def forward(self, x):
        features = self.features(x).relu()
        return self.wrap(self.head(features), features)


def frozen_backbone():
    model = nn.Sequential(nn.Linear(N_FEATURES, 5), nn.ReLU(), nn.Linear(5, 4))
    model[0].requires_grad_(False)
    return model


def lora():
    return nn.Sequential(LowRank(nn.Linear(N_FEATURES, 5)), nn.ReLU(), LowRank(nn.Linear(5, 4)))


def small_cnn():
    return Images(SimpleCNN(num_classes=4))


def criterion(output, y):
    """Of a model that returns more than logits."""
    if isinstance(output, SimpleNamespace):
        output = output.logits
    elif not isinstance(output, torch.Tensor):
        output = output["logits"]
    return nn.functional.cross_entropy(output, y)


def one_task():
    return benchmark(dtype=torch.float64).train_stream


def two_tasks():
    return benchmark(task_labels=True, dtype=torch.float64).train_stream


def tasks(*experiences):
    """Experiences of (task labels, number of classes), 24 samples each."""
    datasets = []
    for seed, (labels, classes) in enumerate(experiences):
        blobs = Blobs(24, seed=seed, dtype=torch.float64)
        y, t = torch.arange(24) % classes, (torch.arange(24) // 3) % len(labels)
        t = torch.tensor(labels)[t].tolist()
        datasets.append(task_aware_dataset(blobs.x, y, task_labels=t))
    return dataset_benchmark(datasets, datasets).train_stream


def padded_out(model, parts):
    """The logits of a sample's own head alone: task 0 has three classes, task 1 has two."""
    logits = avalanche_forward(model, *parts)
    return logits[:, :3] if int(parts[1]) == 0 else logits[:, :2]


def beside_a_copy(model, parts):
    """`MTSimpleCNN` squeezes the axis of a single sample away."""
    return avalanche_forward(model, *(torch.cat([part, part]) for part in parts))[:1]


def plain(model, parts):
    return avalanche_forward(model, *parts)


CASES = {
    "SimpleMLP": (lambda: SimpleMLP(4, N_FEATURES, hidden_size=6), one_task, plain),
    "SimpleCNN": (small_cnn, one_task, plain),
    "MTSimpleMLP": (lambda: MTSimpleMLP(N_FEATURES, hidden_size=6), two_tasks, plain),
    "MTSimpleCNN": (TaskImages, two_tasks, beside_a_copy),
    "IncrementalClassifier": (lambda: Growing(False), one_task, plain),
    "IncrementalClassifier, masked": (lambda: Growing(True), one_task, plain),
    "heads before the backbone": (HeadsFirst, two_tasks, plain),
    "heads before the backbone, masked": (lambda: HeadsFirst(True), two_tasks, plain),
    "heads of different size": (HeadsFirst, lambda: tasks(([0], 3), ([1], 2)), padded_out),
    "tasks mixed in a batch": (HeadsFirst, lambda: tasks(([0], 3), ([0, 1], 2)), padded_out),
    "recurrent": (Recurrent, one_task, plain),
    "frozen backbone": (frozen_backbone, one_task, plain),
    "LoRA": (lora, one_task, plain),
    "dict output": (
        lambda: Returning(lambda logits, features: {"features": features, "logits": logits}),
        one_task,
        lambda model, parts: model(parts[0])["logits"],
    ),
    "object output": (
        lambda: Returning(lambda logits, features: SimpleNamespace(logits=logits)),
        one_task,
        lambda model, parts: model(parts[0]).logits,
    ),
}


def learner_of(make, plugin, **options):
    torch.manual_seed(3)
    return strategy(make(), plugin, optimizer=torch.optim.SGD, lr=0.05, **options)


def samples_of(experience):
    """(x, task labels) and y of an experience, stacked."""
    rows = list(zip(*experience.dataset.eval(), strict=True))
    y = torch.tensor([int(label) for label in rows[1]])
    tasks = torch.tensor([int(t) for t in rows[2]]) if len(rows) > 2 else torch.zeros_like(y)
    return (torch.stack([torch.as_tensor(x) for x in rows[0]]), tasks), y


@pytest.mark.parametrize("kind", ["predicted", "empirical", "exact"])
@pytest.mark.parametrize("case", CASES)
def test_fisher_is_the_sample_loops(case, kind):
    make, stream, forward = CASES[case]
    plugin = DiagonalEWCPlugin(3.0, fisher_type=kind)
    learner = learner_of(make, plugin, criterion=criterion)
    experiences = list(stream())
    train(learner, experiences)
    parts, y = samples_of(experiences[-1])
    learner.model.eval()
    expected = loop_fisher(learner.model, parts, y, kind, forward)
    assert relative_error(plugin.fisher, expected) < 1e-9
    assert max(float(f.max()) for f in plugin.fisher.values()) > 1e-6


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_the_penalty_in_the_loss(case):
    make, stream, _ = CASES[case]

    def run(plugin):
        return train(learner_of(make, plugin, criterion=criterion), stream())

    ours, reference, free = run(DiagonalEWCPlugin(3.0)), run(InTheLoss(3.0)), run(InTheLoss(0.0))
    for name in ours:
        assert torch.allclose(ours[name], reference[name], rtol=1e-9, atol=1e-12), name
    assert any(not torch.allclose(ours[n], free[n], rtol=1e-4) for n in ours)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("mask", ["seen", "new"])
@pytest.mark.parametrize("kind", ["predicted", "exact"])
def test_masked_cross_entropy_names_the_classes(kind, mask):
    plugin = DiagonalEWCPlugin(3.0, fisher_type=kind)
    model = nn.Sequential(nn.Linear(N_FEATURES, 5), nn.ReLU(), nn.Linear(5, 6))
    learner = learner_of(lambda: model, plugin, criterion=MaskedCrossEntropy(mask=mask))
    with torch.no_grad():
        model[2].bias[5] += 100  # the argmax of all classes, and one that no sample has
    stream = one_task()
    train(learner, stream)
    classes = [0, 1, 2, 3] if mask == "seen" else [2, 3]
    parts, y = samples_of(stream[1])
    expected = loop_fisher(model, parts, y, kind, lambda m, p: m(p[0])[:, classes])
    assert relative_error(plugin.fisher, expected) < 1e-9


def test_active_classes_can_be_overridden():
    class Two(DiagonalEWCPlugin):
        def active_classes(self, strategy, batch, logits):
            return torch.tensor([True, True, False, False])

    plugin = Two(3.0, fisher_type="exact")
    learner = learner_of(frozen_backbone, plugin)
    stream = one_task()
    train(learner, stream[:1])
    parts, y = samples_of(stream[0])
    expected = loop_fisher(learner.model, parts, y, "exact", lambda m, p: m(p[0])[:, :2])
    assert relative_error(plugin.fisher, expected) < 1e-9
