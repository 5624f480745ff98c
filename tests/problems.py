"""Named models with data, one per way a layer can be used; and models that must be refused."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

N = 7  # batches of 3 leave a ragged last one


@dataclass(frozen=True)
class Problem:
    """`engine` is the slowest engine that any parameter is expected to need."""

    id: str
    model: Callable[[], nn.Module]
    parts: Callable[[torch.Generator], tuple[Tensor, ...]]
    engine: str = "rules"
    classes: int = 4
    forward: Callable | None = None
    n: int = N

    def build(self, dtype=torch.float64):
        """The model, its inputs (a tuple of tensors [N, ...]) and targets y [N]."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = self.model()
            randomise(model)
        generator = torch.Generator().manual_seed(1)
        parts = tuple(
            part[: self.n].to(dtype) if part.is_floating_point() else part[: self.n]
            for part in self.parts(generator)
        )
        y = torch.randint(self.classes, (self.n,), generator=generator)
        return model.to(dtype), parts, y


def randomise(model):
    """Norm layers start as identities, biases as zeros: give every tensor a generic value."""
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "running_mean", None) is not None:
                module.running_mean.normal_(0, 0.5)
                module.running_var.uniform_(0.5, 2)
        for name, p in model.named_parameters():
            if p.dim() < 2 or "bias" in name:
                p.add_(0.3 * torch.randn_like(p))


def normal(*shape):
    return lambda g: (torch.randn(N, *shape, generator=g, dtype=torch.float64),)


def tokens(length):
    return lambda g: (torch.randint(11, (N, length), generator=g),)


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def mlp(inplace=False, bias=True):
    return nn.Sequential(
        nn.Linear(6, 5, bias=bias), nn.ReLU(inplace=inplace), nn.Linear(5, 4, bias=bias)
    )


def frozen():
    model = mlp()
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.head_of_another_task = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x):
        return self.used(x)


class Tied(nn.Module):
    """Encoder and decoder share a matrix; the head does not."""

    def __init__(self):
        super().__init__()
        self.weight_in = nn.Linear(6, 5)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        hidden = torch.tanh(self.weight_in(x))
        return self.head(torch.tanh(F.linear(hidden, self.weight_in.weight.T)))


class CalledTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


class BareParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.randn(6)), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(torch.tanh(x * self.scale))


class Masked(nn.Module):
    """W * mask: the function sees a product, not the parameter."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)
        self.register_buffer("mask", (torch.rand(4, 6) > 0.5).double())

    def forward(self, x):
        return F.linear(x, self.layer.weight * self.mask.to(x.dtype), self.layer.bias)


class MaskedHead(nn.Module):
    """A head written into a tensor of -1000s, as Avalanche masks absent classes."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x):
        out = torch.full((len(x), 4), -1000.0, dtype=x.dtype)
        out[:, 1:3] = self.head(torch.relu_(self.body(x)))
        return out


class DataDependent(nn.Module):
    """Each sample chooses its layer, which no transform can follow."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x):
        return torch.stack([self.left(row) if row[0] > 0 else self.right(row) for row in x])


class TwoHeads(nn.Module):
    """Task labels choose the head sample by sample, as in Avalanche's MultiTaskModule."""

    def __init__(self):
        super().__init__()
        self.body, self.heads = nn.Linear(6, 5), nn.ModuleList(nn.Linear(5, 4) for _ in range(3))

    def forward(self, x, task):
        hidden = torch.relu(self.body(x))
        out = torch.zeros(len(x), 4, dtype=x.dtype)
        for t in task.unique():
            out[task == t] = self.heads[int(t)](hidden[task == t])
        return out


def with_tasks(g):
    return torch.randn(N, 6, generator=g, dtype=torch.float64), torch.arange(N) // 4


PROBLEMS = [
    Problem("linear", lambda: nn.Linear(6, 4), normal(6)),
    Problem("linear-two-classes", lambda: nn.Linear(6, 2), normal(6), classes=2),
    Problem("mlp", mlp, normal(6)),
    Problem("mlp-inplace-relu", lambda: mlp(inplace=True), normal(6)),
    Problem("mlp-no-bias", lambda: mlp(bias=False), normal(6)),
    Problem("one-sample", mlp, normal(6), n=1),
    Problem("frozen", frozen, normal(6)),
    Problem("unused", Unused, normal(6)),
    Problem(
        "dropout",
        lambda: nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.Linear(5, 4)),
        normal(6),
    ),
    Problem(
        "linear-sequence",
        lambda: nn.Sequential(
            nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3), nn.Flatten(), nn.Linear(9, 4)
        ),
        normal(3, 6),
    ),
    Problem(
        "linear-grid",
        lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Flatten(), nn.Linear(20, 4)),
        normal(2, 2, 3),
    ),
    Problem(
        "time-first",
        lambda: nn.Sequential(
            Lambda(lambda x: x.transpose(0, 1)),
            nn.Linear(6, 5),
            Lambda(lambda h: torch.tanh(h).mean(0)),
            nn.Linear(5, 4),
        ),
        normal(3, 6),
    ),
    Problem(
        "folded-windows",
        lambda: nn.Sequential(
            Lambda(lambda x: x.reshape(-1, 6)),
            nn.Linear(6, 5),
            Lambda(lambda h: torch.tanh(h).reshape(-1, 15)),
            nn.Linear(15, 4),
        ),
        normal(3, 6),
    ),
    Problem("masked-head", MaskedHead, normal(6)),
    Problem("tied", Tied, normal(6), engine="vmap"),
    Problem("called-twice", CalledTwice, normal(6), engine="vmap"),
    Problem("bare-parameter", BareParameter, normal(6), engine="vmap"),
    Problem("weight-mask", Masked, normal(6), engine="vmap"),
    Problem(
        "weight-norm",
        lambda: nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 4)
        ),
        normal(6),
        engine="vmap",
    ),
    Problem("data-dependent", DataDependent, normal(6), engine="loop"),
    Problem("two-heads", TwoHeads, with_tasks, engine="loop", forward=lambda m, b: m(b[0], b[1])),
]
