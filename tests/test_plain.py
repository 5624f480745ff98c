"""EWC in a plain loop: the same Fisher for every form of a dataset, and the loops around it."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ewc_plugin.plain import EWC, ewc_train, normal_train
from ewc_plugin.plain import test as accuracy_of
from support.reference import flags, loop_fisher, relative_error

N, K, C = 7, 6, 4  # samples, features, classes


def mlp(*first):
    torch.manual_seed(0)
    return nn.Sequential(*first, nn.Linear(K, 5), nn.ReLU(), nn.Linear(5, C)).double()


def data(*shape):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, *(shape or (K,)), generator=generator, dtype=torch.float64)
    return x, torch.randint(C, (N,), generator=generator)


FORMS = {
    "samples": lambda x, y: list(x),
    "samples and labels": lambda x, y: [(a, int(b)) for a, b in zip(x, y, strict=True)],
    "tensor": lambda x, y: x,
    "dataset": TensorDataset,
    "inputs alone in batches": lambda x, y: [x[:3], x[3:]],
    "samples with their axis": lambda x, y: [a[None] for a in x],
    "batches": lambda x, y: [(x[:5], y[:5]), (x[5:], y[5:])],
    "generator": lambda x, y: (a for a in x),
    "loader": lambda x, y: DataLoader(TensorDataset(x, y), batch_size=3),
    "loader of inputs": lambda x, y: DataLoader(list(x), batch_size=2),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_fisher_is_the_sample_loops_for_every_form_of_dataset(form):
    model, (x, y) = mlp(), data()
    ewc = EWC(model, form(x, y))
    assert relative_error(ewc.fisher, loop_fisher(model, x, y, "predicted")) < 1e-12


@pytest.mark.parametrize("kind", ["empirical", "exact"])
def test_labels_come_with_the_dataset(kind):
    model, (x, y) = mlp(), data()
    ewc = EWC(model, TensorDataset(x, y), kind)
    assert relative_error(ewc.fisher, loop_fisher(model, x, y, kind)) < 1e-12


def test_samples_of_several_shapes():
    model = nn.Sequential(nn.AdaptiveAvgPool1d(K), nn.Flatten(), nn.Linear(K, C)).double()
    xs = [torch.randn(1, length, dtype=torch.float64) for length in (6, 12, 6, 18)]
    fishers = [loop_fisher(model, x[None], None, "predicted") for x in xs]
    mean = {name: sum(f[name] for f in fishers) / len(xs) for name in fishers[0]}
    assert relative_error(EWC(model, xs, batched=False).fisher, mean) < 1e-12


def test_images_are_told_from_batches_of_them():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, C)).double()
    x, y = data(1, 4, 4)
    reference = loop_fisher(model, x, y, "predicted")
    for dataset in (list(x), [x[:3], x[3:]], [a[None] for a in x]):
        assert relative_error(EWC(model, dataset).fisher, reference) < 1e-12


def test_what_may_be_a_sample_or_a_batch_is_asked_for():
    class Sets(nn.Module):  # [N, points, K] or [points, K]: one row of logits per leading entry
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(K, C).double()

        def forward(self, x):
            return self.layer(x if x.dim() == 2 else x.mean(1))

    model, (x, _) = Sets(), data(3, K)
    with pytest.raises(ValueError, match=r"`dataset` may hold .* \(3, 6\), both ways.*batched"):
        EWC(model, list(x))
    reference = loop_fisher(model, x, None, "predicted")
    assert relative_error(EWC(model, list(x), batched=False).fisher, reference) < 1e-12


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([], "`dataset` is empty"),
        ([torch.zeros(K + 1)], r"`dataset` must hold .* \(7,\), fits neither way"),
        (["text"], "`dataset` must hold .* str, fits neither way"),
    ],
)
def test_bad_datasets(dataset, message):
    with pytest.raises(ValueError, match=message):
        EWC(mlp(), dataset)


def test_penalty_and_its_gradient():
    model, (x, _) = mlp(), data()
    ewc = EWC(model, x)
    anchor = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    ewc.penalty(model).backward()
    expected = 0.0
    for name, p in model.named_parameters():
        expected += float((ewc.fisher[name] * (p.detach() - anchor[name]) ** 2).sum())
        gradient = 2 * ewc.fisher[name] * (p.detach() - anchor[name])
        torch.testing.assert_close(p.grad, gradient, rtol=1e-12, atol=0)
    assert float(ewc.penalty(model).detach()) == pytest.approx(expected, rel=1e-12)


def test_loops_take_the_steps_of_plain_pytorch():
    (x, y), importance, lr = data(), 3.0, 0.1
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    model, by_hand = mlp(), mlp()
    ewc = EWC(model, x)
    anchor = [p.detach().clone() for p in by_hand.parameters()]
    got = [
        normal_train(model, torch.optim.SGD(model.parameters(), lr=lr), batches),
        ewc_train(model, torch.optim.SGD(model.parameters(), lr=lr), batches, ewc, importance),
    ]
    for strength, value in zip((0.0, importance), got, strict=True):
        losses = []
        for bx, by in batches:
            loss = F.cross_entropy(by_hand(bx), by)
            for p, a, f in zip(by_hand.parameters(), anchor, ewc.fisher.values(), strict=True):
                loss = loss + strength * (f * (p - a) ** 2).sum()
            gradients = torch.autograd.grad(loss, list(by_hand.parameters()))
            with torch.no_grad():
                for p, g in zip(by_hand.parameters(), gradients, strict=True):
                    p -= lr * g
            losses.append(float(loss.detach()))
        assert value == pytest.approx(sum(losses) / len(losses), rel=1e-12)
    for p, q in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=0)


def test_accuracy_is_taken_without_dropout_and_leaves_the_flags():
    model, (x, _) = mlp(nn.Dropout(0.9)), data()
    model[1].eval()
    before = flags(model)
    y = model.eval()(x).argmax(1)
    y[:2] = (y[:2] + 1) % C
    for module, flag in zip(model.modules(), before, strict=True):
        module.training = flag
    assert accuracy_of(model, [(x[:3], y[:3]), (x[3:], y[3:])]) == pytest.approx(5 / 7)
    assert flags(model) == before


def test_loops_refuse_what_they_cannot_average():
    model, (x, y) = mlp(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="`data_loader` is empty"):
        normal_train(model, optimizer, [])
    with pytest.raises(ValueError, match="`data_loader` is empty"):
        accuracy_of(model, [])
    with pytest.raises(ValueError, match="`importance` must be finite and >= 0, got -1"):
        ewc_train(model, optimizer, [(x, y)], EWC(model, x), -1)


class Net(nn.Module):
    """A classifier with the interface of a language model's."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x, scale):
        return {"features": x, "logits": self.net(x * scale[:, None])}


def mapping(x, y):
    return {"x": x, "scale": torch.linspace(0.5, 2, len(x)).double(), "labels": y}


def samples_of(batch):
    return [{key: value[i] for key, value in batch.items()} for i in range(len(batch["x"]))]


MAPPINGS = {
    "batches": lambda batch: [batch],
    "samples": samples_of,
    "loader": lambda batch: DataLoader(samples_of(batch), batch_size=3),
}


@pytest.mark.parametrize("kind", ["predicted", "empirical"])
@pytest.mark.parametrize("form", MAPPINGS.values(), ids=MAPPINGS)
def test_mappings_with_labels_and_outputs_with_logits_are_understood(form, kind):
    torch.manual_seed(0)
    model, (x, y) = Net(), data()
    batch = mapping(x, y)
    ewc = EWC(model, form(batch), kind)
    parts = (x, batch["scale"])
    expected = loop_fisher(model, parts, y, kind, lambda m, p: m(*p)["logits"])
    assert relative_error(ewc.fisher, expected) < 1e-12


def test_loops_on_mappings_are_those_on_pairs():
    (x, y), net = data(), mlp()
    model = Net()
    one = {"x": x, "scale": torch.ones(N).double(), "labels": y}
    losses = [
        [
            normal_train(m, torch.optim.SGD(m.parameters(), lr=0.1), batches),
            ewc_train(m, torch.optim.SGD(m.parameters(), lr=0.1), batches, EWC(m, batches), 2.0),
            accuracy_of(m, batches),
        ]
        for m, batches in ((model, [one]), (net, [(x, y)]))
    ]
    assert losses[0] == losses[1]
    for p, q in zip(model.parameters(), net.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("ignored", [-100, 2])
@pytest.mark.parametrize("kind", ["predicted", "empirical", "exact"])
def test_samples_whose_label_is_ignored_are_left_out(kind, ignored):
    model, (x, y) = mlp(), data()
    y[::2] = ignored
    labelled = y != ignored
    ewc = EWC(model, [(x[:1], y[:1]), (x[1:], y[1:])], kind, ignore_index=ignored)
    expected = loop_fisher(model, x[labelled], y[labelled], kind)
    assert relative_error(ewc.fisher, expected) < 1e-12
    accuracy = accuracy_of(model, [(x, y)], ignore_index=ignored)
    assert accuracy == accuracy_of(model, [(x[labelled], y[labelled])])
    others = [mlp(), mlp()]
    for m, batch in zip(others, ((x, y), (x[labelled], y[labelled])), strict=True):
        normal_train(m, torch.optim.SGD(m.parameters(), lr=0.1), [batch], ignore_index=ignored)
    for p, q in zip(others[0].parameters(), others[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-15)


def test_a_fisher_takes_the_place_of_a_dataset():
    model, (x, _) = mlp(), data()
    ewc = EWC(model, x)
    again = EWC(model, ewc.fisher)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert torch.equal(ewc.penalty(model), again.penalty(model))


def test_a_tuple_of_outputs_is_not_guessed():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            return x, self.net(x)

    x, y = data()
    with pytest.raises(ValueError, match="returns a tuple of 2 items"):
        EWC(Two(), [(x, y)], batched=True)
    model = Two()
    with pytest.raises(ValueError, match="returns a tuple of 2 items"):
        normal_train(model, torch.optim.SGD(model.parameters(), lr=0.1), [(x, y)])


def test_torch_is_all_it_imports():
    code = "import sys, torch; before = set(sys.modules); import ewc_plugin.plain;"
    code += "new = {m.split('.')[0] for m in set(sys.modules) - before};"
    code += "third = {m for m in new if m not in sys.stdlib_module_names};"
    code += "assert third <= {'ewc_plugin', 'torch'}, third"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_batch_of_ignored_labels_adds_no_loss():
    x, model = torch.randn(6, 4), nn.Linear(4, 3)
    nothing = (x, torch.full((6,), -100))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert normal_train(model, optimizer, [nothing]) == 0.0
    assert all(torch.isfinite(p).all() for p in model.parameters())
    for compute in (accuracy_of, lambda m, data: EWC(m, data, batched=True)):
        with pytest.raises(ValueError, match="All labels are `ignore_index`"):
            compute(model, [nothing])


@pytest.mark.parametrize("batch", [{"input": torch.ones(2, 4)}, torch.ones(2, 4)])
def test_training_without_labels_names_the_argument(batch):
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises((TypeError, ValueError), match="`data_loader` must yield labels"):
        normal_train(model, optimizer, [batch])
