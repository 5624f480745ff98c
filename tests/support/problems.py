"""Named models with data, one per way a layer can be used; and models that must be refused."""

import warnings
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


class Einsum(BareParameter):
    """No rule knows `einsum`."""

    def forward(self, x):
        return self.head(torch.tanh(torch.einsum("ni,i->ni", x, self.scale)))


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
    return torch.randn(N, 6, generator=g, dtype=torch.float64), torch.arange(N) % 2


def with_late_tasks(g):
    """The trial on the first three samples sees one task; the next batches bring another."""
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
    Problem("tied", Tied, normal(6)),
    Problem("called-twice", CalledTwice, normal(6)),
    Problem("bare-parameter", BareParameter, normal(6)),
    Problem("einsum", Einsum, normal(6), engine="vmap"),
    Problem("weight-mask", Masked, normal(6)),
    Problem(
        "weight-norm",
        lambda: nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 4)
        ),
        normal(6),
    ),
    Problem("data-dependent", DataDependent, normal(6), engine="loop"),
    Problem("two-heads", TwoHeads, with_tasks, engine="loop", forward=lambda m, b: m(b[0], b[1])),
    Problem(
        "two-heads-late",
        TwoHeads,
        with_late_tasks,
        engine="rules",
        forward=lambda m, b: m(b[0], b[1]),
    ),
]


class Attention(nn.Module):
    def __init__(self, batch_first=True, causal=False, padded=False):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=batch_first)
        self.head = nn.Linear(6, 4)
        self.batch_first, self.causal, self.padded = batch_first, causal, padded

    def forward(self, x):
        masks = {"is_causal": self.causal}
        if self.causal:
            mask = nn.Transformer.generate_square_subsequent_mask(x.size(1), dtype=x.dtype)
            masks["attn_mask"] = mask
        if self.padded:  # the last one; a mask of floats, as the other's
            mask = x.new_zeros(x.shape[:2])
            mask[:, -1] = -torch.inf
            masks["key_padding_mask"] = mask
        x = x if self.batch_first else x.transpose(0, 1)
        out = self.attention(x, x, x, need_weights=False, **masks)[0]
        return self.head(out.mean(1 if self.batch_first else 0))


class CrossAttention(nn.Module):
    """Queries of another width than keys: separate projection matrices."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, kdim=3, vdim=3, batch_first=True)
        self.query, self.head = nn.Linear(3, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.attention(self.query(x), x, x)[0].mean(1))


def encoder(norm_first=False):
    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, norm_first=norm_first)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are off with norm_first, it says
        body = nn.TransformerEncoder(layer, 2)
    return nn.Sequential(body, Lambda(lambda h: h.mean(1)), nn.Linear(6, 4))


class Recurrent(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell, self.head = cell(3, 5, batch_first=True), nn.Linear(5, 4)

    def forward(self, x):
        return self.head(self.cell(x)[0][:, -1])


class LowRank(nn.Module):
    """W x + B A x with W frozen, as adapters write it."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(6, 4).requires_grad_(False)
        self.A = nn.Parameter(torch.randn(2, 6))
        self.B = nn.Parameter(torch.randn(4, 2))

    def forward(self, x):
        return self.base(x) + x @ self.A.T @ self.B.T


class Positions(nn.Module):
    """An embedding of positions has no sample axis of its own."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(11, 5), nn.Embedding(6, 5)
        self.head = nn.Linear(5, 4)

    def forward(self, index):
        places = self.places(torch.arange(index.size(1)))
        return self.head(torch.tanh(self.words(index) + places).mean(1))


def conv2d(*args, size=5, channels=4, **kwargs):
    def build():
        layer = nn.Conv2d(channels, 4, *args, **kwargs)
        with torch.no_grad():
            width = layer(torch.zeros(1, channels, size, size)).numel()
        return nn.Sequential(layer, nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(width, 4))

    return build


def then_mean(*layers):
    """Layers on [N, C, ...], then the mean over positions and a head."""
    return lambda: nn.Sequential(
        *(layer() for layer in layers),
        Lambda(lambda h: torch.tanh(h).flatten(2).mean(2)),
        nn.Linear(4, 4),
    )


LAYER_PROBLEMS = [
    Problem("conv", conv2d(3), normal(4, 5, 5)),
    Problem("conv-large-kernel-count", conv2d(3, channels=3), normal(3, 5, 5)),
    Problem("conv-stride-padding", conv2d(3, stride=2, padding=1), normal(4, 5, 5)),
    Problem("conv-same", conv2d((2, 4), padding="same"), normal(4, 5, 5)),
    Problem("conv-valid", conv2d(2, padding="valid"), normal(4, 5, 5)),
    Problem("conv-dilation", conv2d(2, dilation=(2, 1), padding=(0, 1)), normal(4, 5, 5)),
    Problem("conv-groups", conv2d(3, groups=2, bias=False), normal(4, 5, 5)),
    Problem("conv-depthwise", conv2d(3, groups=4, padding=1), normal(4, 5, 5)),
    Problem("conv-circular", conv2d(3, padding=1, padding_mode="circular"), normal(4, 5, 5)),
    Problem("conv-reflect", conv2d(3, padding=1, padding_mode="reflect"), normal(4, 5, 5)),
    Problem("conv-tiny-map", conv2d(3, size=2, padding=1), normal(4, 2, 2)),
    Problem("conv-tiny-stride", conv2d(3, size=3, padding=1, stride=2), normal(4, 3, 3)),
    Problem("conv-one-pixel", conv2d(3, size=1, padding=1), normal(4, 1, 1)),
    Problem("conv-tiny-dilation", conv2d(2, size=3, dilation=2, padding=1), normal(4, 3, 3)),
    Problem("conv1d", then_mean(lambda: nn.Conv1d(3, 4, 3, padding=1)), normal(3, 6)),
    Problem("conv3d", then_mean(lambda: nn.Conv3d(2, 4, 2)), normal(2, 3, 3, 3)),
    Problem(
        "conv-per-frame",
        lambda: nn.Sequential(
            Lambda(lambda x: x.flatten(0, 1)),
            nn.Conv2d(2, 4, 3),
            nn.BatchNorm2d(4),
            nn.PReLU(4),
            Lambda(lambda h: torch.tanh(h).flatten(1).unflatten(0, (-1, 3)).flatten(1)),
            nn.Linear(48, 4),
        ),
        normal(3, 2, 4, 4),
    ),
    Problem(
        "conv-transpose1d",
        then_mean(lambda: nn.ConvTranspose1d(3, 4, 3, stride=2, output_padding=1)),
        normal(3, 5),
    ),
    Problem(
        "conv-transpose2d",
        then_mean(lambda: nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, groups=2)),
        normal(4, 3, 3),
    ),
    Problem(
        "conv-transpose3d",
        then_mean(lambda: nn.ConvTranspose3d(2, 4, 2, dilation=2)),
        normal(2, 2, 2, 2),
    ),
    Problem("batch-norm", then_mean(lambda: nn.BatchNorm2d(4)), normal(4, 3, 3)),
    Problem(
        "batch-norm-flat", lambda: nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 4)), normal(6)
    ),
    Problem("layer-norm", lambda: nn.Sequential(nn.LayerNorm(6), mlp()), normal(6)),
    Problem(
        "layer-norm-two-axes",
        lambda: nn.Sequential(nn.LayerNorm((3, 6), bias=False), nn.Flatten(), nn.Linear(18, 4)),
        normal(3, 6),
    ),
    Problem(
        "layer-norm-sequence",
        lambda: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 5), nn.Flatten(), nn.Linear(25, 4)),
        normal(5, 6),
    ),
    Problem("group-norm", then_mean(lambda: nn.GroupNorm(2, 4)), normal(4, 3, 3)),
    Problem("instance-norm", then_mean(lambda: nn.InstanceNorm2d(4, affine=True)), normal(4, 3, 3)),
    Problem(
        "instance-norm-running",
        then_mean(lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True)),
        normal(4, 5),
    ),
    Problem(
        "rms-norm",
        lambda: nn.Sequential(nn.RMSNorm(6), Lambda(lambda h: h.mean(1)), nn.Linear(6, 4)),
        normal(3, 6),
    ),
    Problem(
        "prelu", lambda: nn.Sequential(nn.Linear(6, 5), nn.PReLU(), nn.Linear(5, 4)), normal(6)
    ),
    Problem("prelu-channels", then_mean(lambda: nn.PReLU(4)), normal(4, 3)),
    Problem(
        "embedding",
        lambda: nn.Sequential(nn.Embedding(11, 5), nn.Flatten(), nn.Linear(30, 4)),
        tokens(6),
    ),
    Problem(
        "embedding-padding",
        lambda: nn.Sequential(
            nn.Embedding(11, 5, padding_idx=-8),
            Lambda(lambda h: torch.tanh(h).mean(1)),
            nn.Linear(5, 4),
        ),
        tokens(9),
    ),
    Problem(
        "embedding-sparse",
        lambda: nn.Sequential(nn.Embedding(11, 5, sparse=True), nn.Flatten(), nn.Linear(15, 4)),
        tokens(3),
    ),
    Problem(
        "embedding-by-frequency",
        lambda: nn.Sequential(
            nn.Embedding(11, 5, scale_grad_by_freq=True), nn.Flatten(), nn.Linear(45, 4)
        ),
        tokens(9),
        engine="vmap",
    ),
    Problem("positions", Positions, tokens(6)),
    Problem("attention", Attention, normal(3, 6)),
    Problem("attention-time-first", lambda: Attention(batch_first=False), normal(3, 6)),
    Problem("attention-causal", lambda: Attention(causal=True), normal(3, 6)),
    Problem("attention-padded", lambda: Attention(causal=True, padded=True), normal(3, 6)),
    Problem("attention-cross", CrossAttention, normal(5, 3)),
    Problem("transformer", encoder, normal(5, 6)),
    Problem("transformer-norm-first", lambda: encoder(norm_first=True), normal(3, 6)),
    Problem("rnn", lambda: Recurrent(nn.RNN), normal(4, 3)),
    Problem("lstm", lambda: Recurrent(nn.LSTM), normal(4, 3)),
    Problem("gru", lambda: Recurrent(nn.GRU), normal(4, 3)),
    Problem("low-rank-adapter", LowRank, normal(6)),
]
PROBLEMS += LAYER_PROBLEMS
