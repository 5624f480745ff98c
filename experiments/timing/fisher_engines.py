"""Networks and engines of the Fisher benchmark: ours, plain PyTorch, and other libraries.

An engine is a function of a `Problem`; it prepares whatever it needs and returns a function that
computes the diagonal Fisher (mean over samples) as {parameter name: tensor} each time it is called.
A library is imported where it is used, so that an absent one only costs its own row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from importlib import metadata

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ewc_plugin.fisher.diagonal import diagonal_fisher

Fisher = dict[str, Tensor]
CLASSES = 10


@dataclass(frozen=True)
class Problem:
    """A network, its samples, and the kind of Fisher to compute.

    Attributes:
        model: In eval mode.
        x: Inputs [N, ...].
        y: The model's own predictions [N], so that those who ask for labels compute PREDICTED.
        kind: "predicted" or "exact".
        batch_size: Of the engines that do not choose their own.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    kind: str
    batch_size: int

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and labels in batches."""
        return zip(self.x.split(self.batch_size), self.y.split(self.batch_size), strict=True)

    def named(self) -> dict[str, nn.Parameter]:
        """Parameters by name."""
        return dict(self.model.named_parameters())

    def of_memory(self) -> int:
        """The batch size, or so many samples that their gradients fit into 256 MiB."""
        return max(1, min(self.batch_size, 2**26 // sum(p.numel() for p in self.named().values())))

    def mean(self, squares: Callable[[Tensor, Tensor], Fisher], size: int) -> Callable[[], Fisher]:
        """Return a function for the mean over samples of what `squares` sums over a batch."""

        def run() -> Fisher:
            sums = {name: torch.zeros_like(p) for name, p in self.named().items()}
            for x, y in zip(self.x.split(size), self.y.split(size), strict=True):
                for name, part in squares(x, y).items():
                    sums[name] += part
            return {name: total / len(self.x) for name, total in sums.items()}

        return run


class NotOfferedError(Exception):
    """The library does not offer this label type."""


# Networks: Avalanche's, torchvision's and PyTorch's own, in eval mode.


def mlp(*hidden: int) -> nn.Sequential:
    """A fully connected network of 784 inputs, with ReLUs."""
    widths = [784, *hidden, CLASSES]
    layers: list[nn.Module] = []
    for i, o in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(i, o), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def simple_cnn() -> nn.Module:
    """Avalanche's `SimpleCNN`, with in-place ReLUs and dropout."""
    from avalanche.models import SimpleCNN

    model: nn.Module = SimpleCNN(num_classes=CLASSES)
    return model


def resnet18() -> nn.Module:
    """Torchvision's ResNet-18."""
    from torchvision.models import resnet18 as build

    model: nn.Module = build(num_classes=CLASSES)
    return model


class Transformer(nn.Module):
    """Two encoder layers of width 128 on 32 words."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(1000, 128)
        layer = nn.TransformerEncoderLayer(128, 4, 512, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(128, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Word indices [N, 32] to logits."""
        logits: Tensor = self.head(self.body(self.words(x)).mean(1))
        return logits


class Recurrent(nn.Module):
    """One recurrent layer of width 128 on 32 words, read at its last step."""

    def __init__(self, layer: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(1000, 128), nn.Linear(128, CLASSES)
        self.body = layer(128, 128, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Word indices [N, 32] to logits."""
        logits: Tensor = self.head(self.body(self.words(x))[0][:, -1])
        return logits


class Pretrained(nn.Module):
    """A small, random `transformers` model; of a language model the last logits of some words."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Word indices [N, 32] or images to logits."""
        logits: Tensor = self.model(x).logits
        return logits if logits.dim() == 2 else logits[:, -1, :CLASSES]


_SMALL = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
_SMALL |= {"intermediate_size": 512, "num_labels": CLASSES}


def bert() -> nn.Module:
    """A BERT of three layers."""
    from transformers import BertConfig, BertForSequenceClassification

    return Pretrained(BertForSequenceClassification(BertConfig(vocab_size=1000, **_SMALL)))


def gpt2() -> nn.Module:
    """A GPT-2 of three layers, whose words in and out are one table."""
    from transformers import GPT2Config, GPT2LMHeadModel

    small = {"n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": 64}
    return Pretrained(
        GPT2LMHeadModel(GPT2Config(vocab_size=1000, bos_token_id=0, eos_token_id=0, **small))
    )


def vit() -> nn.Module:
    """A vision transformer of three layers, with a class token and LayerScale."""
    from transformers import Dinov2Config, Dinov2ForImageClassification

    images = {"image_size": 32, "patch_size": 4}
    config = Dinov2Config(use_mask_token=False, **images, **_SMALL)  # of its pretraining alone
    return Pretrained(Dinov2ForImageClassification(config))


@dataclass(frozen=True)
class Network:
    """A network, and the sizes that it is measured with.

    Attributes:
        build: Makes it.
        shape: Of one input; empty for 32 words.
        samples: Of one measurement.
        slow_samples: Of one measurement of a slow engine.
        batch_size: Of the gradient pass, and of the engines that do not choose their own.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    samples: int
    slow_samples: int
    batch_size: int


NETWORKS = {
    # So many samples that what a call costs once is 2 to 4 % (7 % of ResNet-18); an experience has
    # more.
    "mlp-512": Network(lambda: mlp(512), (784,), 12288, 128, 512),
    "mlp-2000": Network(lambda: mlp(2000, 2000), (784,), 4096, 32, 512),
    "simple-cnn": Network(simple_cnn, (3, 32, 32), 512, 512, 32),
    "resnet-18": Network(resnet18, (3, 32, 32), 512, 16, 128),
    "transformer": Network(Transformer, (), 1024, 256, 64),
    "bert": Network(bert, (), 512, 64, 64),
    "gpt2": Network(gpt2, (), 512, 64, 64),
    "vit": Network(vit, (3, 32, 32), 256, 64, 64),
    "lstm": Network(lambda: Recurrent(nn.LSTM), (), 2048, 256, 128),
    "gru": Network(lambda: Recurrent(nn.GRU), (), 2048, 256, 128),
}


def make_problem(network: str, kind: str, *, samples: int, device: str = "cpu") -> Problem:
    """The network with random weights and inputs, the same on each call."""
    spec = NETWORKS[network]
    torch.manual_seed(0)
    model = spec.build().eval().to(device)
    x = torch.randn(samples, *spec.shape) if spec.shape else torch.randint(1000, (samples, 32))
    x = x.to(device)
    with torch.no_grad():
        y = torch.cat([model(part).argmax(1) for part in x.split(spec.batch_size)])
    return Problem(model, x, y, kind, spec.batch_size)


# Ours, and what plain PyTorch offers.


def gradient_pass(problem: Problem) -> Callable[[], Fisher]:
    """One forward and backward over the samples, its gradients summed: the unit of all times."""

    def run() -> Fisher:
        sums = {name: torch.zeros_like(p) for name, p in problem.named().items()}
        for x, y in problem.batches():
            loss = F.cross_entropy(problem.model(x), y, reduction="sum")
            grads = torch.autograd.grad(loss, list(problem.named().values()))
            for total, grad in zip(sums.values(), grads, strict=True):
                total += grad
        return sums

    return run


def ours(problem: Problem) -> Callable[[], Fisher]:
    """`diagonal_fisher` with its defaults."""
    return lambda: diagonal_fisher(problem.model, [(problem.x, problem.y)], problem.kind)


def sample_loop(problem: Problem) -> Callable[[], Fisher]:
    """One sample and one label at a time, as the definition reads."""

    def run() -> Fisher:
        params = problem.named()
        sums = {name: torch.zeros_like(p) for name, p in params.items()}
        for n in range(len(problem.x)):
            log_p = F.log_softmax(problem.model(problem.x[n : n + 1]), 1)[0]
            labels = range(CLASSES) if problem.kind == "exact" else [int(problem.y[n])]
            for c in labels:
                weight = float(log_p[c].detach().exp()) if problem.kind == "exact" else 1.0
                grads = torch.autograd.grad(log_p[c], list(params.values()), retain_graph=True)
                for total, grad in zip(sums.values(), grads, strict=True):
                    total.add_(grad.square(), alpha=weight)
        return {name: total / len(problem.x) for name, total in sums.items()}

    return run


def vmap_grad(problem: Problem, *, compiled: bool = False) -> Callable[[], Fisher]:
    """`torch.func`'s per-sample gradients, as its tutorial has them."""
    from torch.func import functional_call, grad, vmap

    if problem.kind != "predicted":
        raise NotOfferedError("one label per sample")
    params = {name: p.detach() for name, p in problem.named().items()}

    def loss(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(problem.model, p, (x[None],)), y[None])

    per_sample = vmap(grad(loss), in_dims=(None, 0, 0))

    def squares(p: dict[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {name: g.square().sum(0) for name, g in per_sample(p, x, y).items()}

    call = torch.no_grad()(torch.compile(squares) if compiled else squares)
    return problem.mean(partial(call, params), problem.of_memory())


def vmap_compiled(problem: Problem) -> Callable[[], Fisher]:
    """`vmap_grad` through `torch.compile`."""
    if len(problem.named()) > 50:
        raise NotOfferedError("networks that compile in minutes")
    return vmap_grad(problem, compiled=True)


# Other libraries.


def without_inplace(model: nn.Module) -> nn.Module:
    """A copy that libraries with module hooks can take."""
    model = deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return model


def avalanche(problem: Problem) -> Callable[[], Fisher]:
    """Avalanche's importances at batch 128: squares of mini-batch means."""
    from avalanche.training.plugins import EWCPlugin

    if problem.kind != "predicted":
        raise NotOfferedError("the criterion's labels")
    model = deepcopy(problem.model)
    x, y = problem.x.cpu(), problem.y.cpu()
    dataset = [(x[n], int(y[n]), 0) for n in range(len(x))]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plugin = EWCPlugin(1.0)

    def run() -> Fisher:
        importances = plugin.compute_importances(
            model, nn.CrossEntropyLoss(), optimizer, dataset, problem.x.device, 128
        )
        return {name: value.data for name, value in importances.items()}

    return run


def backpack(problem: Problem) -> Callable[[], Fisher]:
    """BackPACK's `SumGradSquared`, and `DiagGGNExact` for all classes."""
    from backpack import backpack as extensions
    from backpack import extend
    from backpack.extensions import DiagGGNExact, SumGradSquared

    model = extend(without_inplace(problem.model))
    criterion = extend(nn.CrossEntropyLoss(reduction="sum"))
    exact = problem.kind == "exact"

    def squares(x: Tensor, y: Tensor) -> Fisher:
        model.zero_grad()
        with extensions(DiagGGNExact() if exact else SumGradSquared()):
            criterion(model(x), y).backward()
        kind = "diag_ggn_exact" if exact else "sum_grad_squared"
        return {name: getattr(p, kind) for name, p in model.named_parameters()}

    return problem.mean(squares, problem.batch_size)


def opacus(problem: Problem) -> Callable[[], Fisher]:
    """Opacus's per-sample gradients, from module hooks."""
    from opacus import GradSampleModule

    if problem.kind != "predicted":
        raise NotOfferedError("one label per sample")
    model = GradSampleModule(without_inplace(problem.model), loss_reduction="sum")
    model.train()  # its hooks are off in eval mode
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()

    def squares(x: Tensor, y: Tensor) -> Fisher:
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), y, reduction="sum").backward()
        parameters = model._module.named_parameters()
        return {name: p.grad_sample.square().sum(0) for name, p in parameters}

    return problem.mean(squares, problem.of_memory())


def asdfghjkl(problem: Problem) -> Callable[[], Fisher]:
    """ASDL; its package on PyPI is called asdfghjkl and imported as asdl."""
    from asdl import (
        FISHER_EMP,
        FISHER_EXACT,
        LOSS_CROSS_ENTROPY,
        SHAPE_DIAG,
        FisherConfig,
        get_fisher_maker,
    )

    model = deepcopy(problem.model)
    kind = FISHER_EXACT if problem.kind == "exact" else FISHER_EMP
    config = FisherConfig(fisher_type=kind, fisher_shapes=SHAPE_DIAG, data_size=len(problem.x),
                          loss_type=LOSS_CROSS_ENTROPY)  # fmt: skip
    maker = get_fisher_maker(model, config)

    def run() -> Fisher:
        for i, (x, y) in enumerate(problem.batches()):
            dummy = maker.setup_model_call(model, x)
            if problem.kind == "exact":
                maker.setup_logits_repr(dummy)
            else:
                maker.setup_loss_call(F.cross_entropy, dummy, y, reduction="sum")
            maker.forward_and_backward(accumulate=i > 0)
        result = {name: torch.zeros_like(p) for name, p in problem.named().items()}
        for path, module in model.named_modules():
            diagonal = getattr(getattr(module, "fisher", None), "diag", None)
            for role in ("weight", "bias"):
                value = getattr(diagonal, role, None)
                name = f"{path}.{role}" if path else role
                if value is not None and name in result:
                    result[name] = value
        return result

    return run


def nngeometry(problem: Problem) -> Callable[[], Fisher]:
    """The diagonal of nngeometry's Fisher matrix."""
    from nngeometry.metrics import FIM
    from nngeometry.object import PMatDiag
    from torch.utils.data import DataLoader, TensorDataset

    if problem.kind != "exact":
        raise NotOfferedError("all classes")
    model = deepcopy(problem.model)
    loader = DataLoader(TensorDataset(problem.x, problem.y), batch_size=problem.batch_size)

    def run() -> Fisher:
        fim = FIM(model, loader, PMatDiag, variant="classif_logits", device=problem.x.device)
        parts = fim.get_diag().split([p.numel() for p in problem.named().values()])
        named = zip(problem.named().items(), parts, strict=True)
        return {name: part.view_as(p) for (name, p), part in named}

    return run


def laplace(problem: Problem) -> Callable[[], Fisher]:
    """The empirical Fisher of laplace-torch, through its curvlinops backend."""
    from laplace.curvature.curvlinops import CurvlinopsEF

    if problem.kind != "predicted":
        raise NotOfferedError("one label per sample")
    backend = CurvlinopsEF(deepcopy(problem.model), "classification")
    named = problem.named()

    def squares(x: Tensor, y: Tensor) -> Fisher:
        parts = backend.diag(x, y)[1].split([p.numel() for p in named.values()])
        return {n: part.view_as(named[n]) for n, part in zip(named, parts, strict=True)}

    return problem.mean(squares, problem.of_memory())


@dataclass(frozen=True)
class Engine:
    """One way to compute the Fisher.

    Attributes:
        prepare: Maps a problem to the function that is timed.
        package: As it is installed; empty for what needs nothing more.
        slow: Measured on fewer samples, where what a call costs once hardly counts.
        exact: Claims to be exact per sample.
    """

    prepare: Callable[[Problem], Callable[[], Fisher]]
    package: str = ""
    slow: bool = False
    exact: bool = True

    def version(self) -> str | None:
        """Installed version; empty where there is no package, None where it is absent."""
        try:
            return metadata.version(self.package) if self.package else ""
        except metadata.PackageNotFoundError:
            return None


UNIT = "gradient pass"
OURS = "ewc-plugin"
ENGINES = {
    UNIT: Engine(gradient_pass, exact=False),
    OURS: Engine(ours),
    "sample loop": Engine(sample_loop, slow=True),
    "vmap(grad)": Engine(vmap_grad, slow=True),
    "vmap(grad), compiled": Engine(vmap_compiled),
    "Avalanche EWC": Engine(avalanche, "avalanche-lib", exact=False),
    "BackPACK": Engine(backpack, "backpack-for-pytorch"),
    "Opacus": Engine(opacus, "opacus", slow=True),
    "asdfghjkl": Engine(asdfghjkl, "asdfghjkl"),
    "nngeometry": Engine(nngeometry, "nngeometry", slow=True),
    "Laplace": Engine(laplace, "laplace-torch", slow=True),
}


_NOISE = 1e-20  # of F, where gradients have 1e-16 of the largest as rounding noise


def relative_error(got: Fisher, expected: Fisher) -> float:
    """Largest over parameters of max |got - expected| / max |expected|.

    A gradient that is zero in exact arithmetic, such as that of the bias of attention's keys, is
    rounding noise in float64 too. Then the scale is the network's largest entry times 1e-8, the F
    of a gradient of 1e-4 of the largest.

    Args:
        got: F in any type.
        expected: F in float64.
    """
    worst = 0.0
    largest = {name: e.abs().max().item() for name, e in expected.items()}
    whole = max(largest.values())
    for name, e in expected.items():
        difference = (got[name].double() - e.double()).abs().max().item()
        scale = largest[name] if largest[name] > _NOISE * whole else 1e-8 * whole
        if scale:
            worst = max(worst, difference / scale)
    return worst if math.isfinite(worst) else math.inf
