"""The recipes for other trainers run, and take the steps of a plain loop to the last bit."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ewc_plugin import QuadraticPenalty, diagonal_fisher
from support.pages import run_page
from support.paths import ROOT

# The libraries' own warnings, of which each release has others.
pytestmark = pytest.mark.filterwarnings("ignore")
PAGES = ROOT / "docs" / "pages" / "how-to"
LAMBDA, ACCUMULATED, EPOCHS = 0.5, 2, 2


@pytest.fixture
def names_of(tmp_path, monkeypatch, capsys):
    """Run a page in an empty folder; return its names."""
    monkeypatch.chdir(tmp_path)

    def run(page):
        for needed in {"hugging-face": ("transformers", "accelerate")}.get(page, (page,)):
            pytest.importorskip(needed)
        return run_page(PAGES / f"{page}.md")

    return run


def task(t):
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(t))
    return x, (x[:, t] > 0).long()


def plain_loop(model, batches, loss_of, penalty):
    """Reference: train on the batches, the penalty's gradient once in each step."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(EPOCHS):
        for i, batch in enumerate(batches, 1):
            (loss_of(model, batch) / ACCUMULATED).backward()
            if i % ACCUMULATED == 0:
                penalty.add_gradient_(model, LAMBDA)
                optimizer.step()
                optimizer.zero_grad()


def consolidated(model, batches):
    penalty = QuadraticPenalty(normalize="mean")
    penalty.consolidate(model, fisher := diagonal_fisher(model, batches, "predicted"))
    with torch.no_grad():  # away from the anchor, so that the penalty pulls from the first step
        for p in model.parameters():
            p.add_(0.1)
    return penalty, fisher


def assert_same(model, reference):
    for (name, a), (_, b) in zip(
        model.named_parameters(), reference.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name


def cross_entropy(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def loader_of(t):
    return DataLoader(TensorDataset(*task(t)), batch_size=4)


def test_accelerate_takes_the_steps_of_a_plain_loop(names_of):
    names = names_of("accelerate")
    assert names["penalty"].n_experiences == 2
    names["penalty"].load_state_dict(QuadraticPenalty(normalize="mean").state_dict())
    names["accelerator"].load_state("checkpoint")
    assert names["penalty"].n_experiences == 2
    # The page's own run: the same calls on a model and data that never met the library.
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    x = torch.randn(64, 8)
    penalty, optimizer = (
        QuadraticPenalty(normalize="mean"),
        torch.optim.Adam(net.parameters(), 1e-2),
    )
    for t in range(2):
        batches = list(zip(x.split(8), (x[:, t] > 0).long().split(8), strict=True))
        for _ in range(2):
            for i, batch in enumerate(batches, 1):
                (cross_entropy(net, batch) / 2).backward()
                if i % 2 == 0:
                    penalty.add_gradient_(net, 0.01)
                    optimizer.step()
                    optimizer.zero_grad()
        penalty.consolidate(net, diagonal_fisher(net, batches, "predicted"))
    assert_same(names["net"], net)
    assert torch.equal(penalty(net), names["penalty"](names["net"]))


@pytest.fixture
def lightning_run(names_of):
    names = names_of("lightning")
    assert names["ewc"].penalty.n_experiences == 2
    import lightning

    def fit(module, penalty, epochs=EPOCHS, **options):
        callback = names["EWCCallback"](penalty, LAMBDA)
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accumulate_grad_batches=ACCUMULATED,
            callbacks=[callback],
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, loader_of(1), **options)
        return trainer, callback

    torch.manual_seed(1)
    return fit, names["Classifier"]()


def test_lightning_takes_the_steps_of_a_plain_loop(lightning_run):
    fit, module = lightning_run
    reference = copy.deepcopy(module)
    penalty, fisher = consolidated(module, loader_of(0))
    plain, plain_fisher = consolidated(reference, list(loader_of(0)))
    assert all(torch.equal(fisher[name], plain_fisher[name]) for name in plain_fisher)
    fit(module, penalty)
    plain_loop(reference, list(loader_of(1)), cross_entropy, plain)
    assert_same(module, reference)


def test_lightning_resumes_with_the_penalty(lightning_run, tmp_path):
    fit, module = lightning_run
    other = copy.deepcopy(module)
    penalty, _ = consolidated(module, loader_of(0))
    whole = copy.deepcopy(module)
    trainer, _ = fit(module, penalty, epochs=1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    fit(whole, penalty)
    _, callback = fit(other, QuadraticPenalty(normalize="mean"), ckpt_path=tmp_path / "half.ckpt")
    assert callback.penalty.n_experiences == 1
    assert_same(other, whole)


class Net(nn.Module):
    """A model as `Trainer` wants it: the loss among its outputs, where labels come in."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))

    def forward(self, x, labels=None):
        logits = self.layers(x)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"logits": logits} if loss is None else {"loss": loss, "logits": logits}


@pytest.fixture
def trainer_of(names_of):
    names = names_of("hugging-face")
    assert names["penalty"].n_experiences == names["resumed"].n_experiences + 1 == 2
    from transformers import Trainer, TrainingArguments

    def make(model, penalty, batches):
        args = TrainingArguments(
            "out",
            per_device_train_batch_size=4,
            gradient_accumulation_steps=ACCUMULATED,
            num_train_epochs=EPOCHS,
            lr_scheduler_type="constant",
            max_grad_norm=0,
            save_strategy="epoch",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        data = [{"x": x, "labels": y} for x, y in zip(*task(1), strict=True)]

        def collate(items):
            batches.append({k: torch.stack([item[k] for item in items]) for k in items[0]})
            return batches[-1]

        return Trainer(
            model,
            args,
            train_dataset=data,
            data_collator=collate,
            callbacks=[names["EWCCallback"](penalty, LAMBDA)],
            optimizers=(torch.optim.Adam(model.parameters(), lr=1e-2), None),
        )

    torch.manual_seed(1)
    return make, Net()


def mapping_loader(t):
    x, y = task(t)
    return [{"x": a, "labels": b} for a, b in zip(x.split(4), y.split(4), strict=True)]


def test_hugging_face_takes_the_steps_of_a_plain_loop(trainer_of):
    make, model = trainer_of
    reference = copy.deepcopy(model)
    penalty, fisher = consolidated(model, mapping_loader(0))
    plain, plain_fisher = consolidated(
        reference, [(b["x"], b["labels"]) for b in mapping_loader(0)]
    )
    assert all(torch.equal(fisher[name], plain_fisher[name]) for name in plain_fisher)
    trainer = make(model, penalty, batches := [])
    trainer.train()
    n = len(batches) // EPOCHS
    assert n == 10
    optimizer = torch.optim.Adam(reference.parameters(), lr=1e-2)
    for i, batch in enumerate(batches, 1):
        (reference(**batch)["loss"] / ACCUMULATED).backward()
        if i % ACCUMULATED == 0:
            plain.add_gradient_(reference, LAMBDA)
            optimizer.step()
            optimizer.zero_grad()
    assert_same(model, reference)


def test_hugging_face_resumes_with_the_penalty(trainer_of):
    make, model = trainer_of
    other = copy.deepcopy(model)
    penalty, _ = consolidated(model, mapping_loader(0))
    make(model, penalty, []).train()
    half = "out/checkpoint-5"
    resumed = QuadraticPenalty(normalize="mean")
    resumed.load_state_dict(torch.load(f"{half}/ewc.pt", weights_only=True))
    make(other, resumed, []).train(resume_from_checkpoint=half)
    assert_same(other, model)
