"""What the engine does around the sums: memory, precision, subsets, engines, refusals."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ewc_plugin.batches import draw_samples, n_entries
from ewc_plugin.fisher import accumulate
from ewc_plugin.fisher.diagonal import diagonal_fisher, explain
from support.problems import PROBLEMS, DataDependent, Einsum, mlp
from support.reference import flags, loop_fisher, relative_error

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def data(n=7, width=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, width, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(4, (n,), generator=generator)


def seeded(build, dtype=torch.float64):
    torch.manual_seed(0)
    return build().to(dtype).eval()


def doubled(fisher):
    return {name: f.double() for name, f in fisher.items()}


@pytest.mark.parametrize("kind", ["predicted", "empirical", "exact"])
def test_softmax_regression_has_a_closed_form(kind):
    model, (x, y) = seeded(lambda: nn.Linear(6, 4)), data()
    p = model(x).softmax(1).detach()
    if kind == "exact":  # E (onehot_c - p_c)^2 = p_c (1 - p_c)
        second_moment = p * (1 - p)
    else:
        labels = p.argmax(1) if kind == "predicted" else y
        second_moment = (F.one_hot(labels, 4) - p).square()
    got = diagonal_fisher(model, [(x, y)], kind)
    torch.testing.assert_close(got["weight"], second_moment.T @ x.square() / 7, rtol=1e-12, atol=0)
    torch.testing.assert_close(got["bias"], second_moment.mean(0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("engine", ["rules", "vmap", "loop"])
def test_a_thousand_classes(engine):
    model, (x, y) = seeded(lambda: nn.Linear(6, 1000)), data(3)
    p = model(x).softmax(1).detach()
    got = diagonal_fisher(model, [(x, y)], "exact", engine=engine)
    expected = (p * (1 - p)).T @ x.square() / 3
    torch.testing.assert_close(got["weight"], expected, rtol=1e-11, atol=0)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.id)
def test_float32_is_within_1e_4(problem):
    # The reference shares the float32 weights and runs in float64, but its ReLUs may flip: both
    # come from one float32 forward where that happens, and no problem here is that close to zero.
    model, parts, y = problem.build(torch.float32)
    forward = problem.forward or (lambda m, b: m(b[0]))
    got = diagonal_fisher(model, [(parts, y)], "exact", forward=lambda m, b: forward(m, b[0]))
    assert all(f.dtype == torch.float32 for f in got.values())
    wide = tuple(part.double() if part.is_floating_point() else part for part in parts)
    expected = loop_fisher(model.double().eval(), wide, y, "exact", problem.forward)
    assert relative_error(got, expected) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["predicted", "exact"])
@pytest.mark.parametrize("build", [mlp, Einsum], ids=["rules", "vmap"])
def test_half_precision_has_no_silent_zeros(dtype, kind, build):
    model, (x, y) = seeded(build, dtype), data(dtype=dtype)
    head = model[2] if build is mlp else model.head
    with torch.no_grad():
        head.bias[1] += 14  # p = 1 - 1e-6: the square of its score is below float16's smallest
    got = diagonal_fisher(model, [(x, y)], kind)
    assert all(f.dtype == torch.float32 for f in got.values())
    expected = loop_fisher(model.double(), x.double(), y, kind)
    assert expected[next(iter(expected))].max() < 1e-4
    # Logits near 14 are rounded to 2^-7 (float16) or 2^-4 (bfloat16), which is the relative error
    # of 1 - p, and its square is in F.
    assert relative_error(got, expected) < (0.05 if dtype is torch.float16 else 0.5)


def test_autocast_sums_in_float32():
    model, (x, y) = seeded(mlp, torch.float32), data(dtype=torch.float32)
    expected = diagonal_fisher(model, [(x, y)])
    with torch.autocast("cpu", torch.bfloat16):
        got = diagonal_fisher(model, [(x, y)])
    assert all(f.dtype == torch.float32 for f in got.values())
    assert 0 < relative_error(got, doubled(expected)) < 0.1


@pytest.mark.parametrize("build", [mlp, Einsum], ids=["rules", "vmap"])
@pytest.mark.parametrize("where", ["forward", "backward"])  # before and after the labels are drawn
def test_out_of_memory_halves_the_chunk(where, build):
    model, (x, y) = seeded(build), data()
    expected = diagonal_fisher(model, [(x, y)], "sampled", n_draws=3)
    sizes = []

    def run_out(g):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    def forward(m, batch):
        sizes.append(len(batch[0]))
        out = m(batch[0])
        if len(batch[0]) > 3:
            run_out(None) if where == "forward" else out.register_hook(run_out)
        return out

    got = diagonal_fisher(model, [(x, y)], "sampled", n_draws=3, forward=forward)
    assert 7 in sizes and 4 in sizes  # tried, and halved twice
    assert relative_error(got, expected) < 1e-12


def test_out_of_memory_at_one_sample_raises():
    calls = []

    def forward(m, batch):
        calls.append(len(batch[0]))
        if len(calls) > 3:  # the probe passes
            raise torch.OutOfMemoryError("CUDA out of memory")
        return m(batch[0])

    model = seeded(mlp).train()
    before = flags(model)
    with pytest.raises(torch.OutOfMemoryError):
        diagonal_fisher(model, [data()], forward=forward)
    assert calls[-1] == 1
    assert flags(model) == before


def chunks(model, batches, *args, **kwargs):
    """Sizes of the chunks of a pass, without the few samples of the probe and the audits."""
    sizes = []

    def forward(m, batch):
        sizes.append(len(batch[0]))
        return m(batch[0])

    diagonal_fisher(model, batches, *args, forward=forward, **kwargs)
    return [size for size in sizes if size > 8]


def test_one_vector_has_larger_chunks_where_there_are_many_small_layers():
    layers = [nn.LayerNorm(1024) for _ in range(16)]
    model = nn.Sequential(*layers, nn.Linear(1024, 4)).eval()
    batches = [data(256, 1024, torch.float32)]
    assert chunks(model, batches, "predicted") == [256]
    assert chunks(model, batches, "sampled") == [256]
    assert chunks(model, batches, "sampled", n_draws=2) == [128, 128]
    assert chunks(model, batches, "exact") == [128, 128]


def test_a_chunk_costs_the_same_whatever_went_before(monkeypatch):
    calls = []
    monkeypatch.setattr(
        accumulate, "n_entries", lambda batch: calls.append(batch) or n_entries(batch)
    )
    diagonal_fisher(seeded(mlp), [data(40)], chunk_size=2)
    assert len(calls) == 20


def test_overwritten_input_stays_the_callers():
    model = seeded(lambda: nn.Sequential(nn.LeakyReLU(0.5, inplace=True), nn.Linear(6, 4)))
    x, y = data()
    kept = x.clone()
    got = diagonal_fisher(model, [(x, y)], chunk_size=3)
    assert torch.equal(x, kept)
    assert relative_error(got, loop_fisher(model, kept.clone(), y, "predicted")) < 1e-12


def test_max_samples_draws_without_replacement():
    model, (x, y) = seeded(mlp), data(40)
    batches = [(x[i : i + 16], y[i : i + 16]) for i in range(0, 40, 16)]
    seen = []

    def forward(m, batch):
        seen.extend(batch[0][:, 0].tolist())
        return m(batch[0])

    def drawn(size, seed):
        seen.clear()
        generator = torch.Generator().manual_seed(seed)
        diagonal_fisher(
            model, batches, max_samples=size, generator=generator, forward=forward, chunk_size=99
        )
        return sorted(set(seen))

    assert len(drawn(10, 0)) == 10
    assert drawn(10, 0) != drawn(10, 1)
    assert drawn(100, 0) == sorted(x[:, 0].tolist())


def test_every_sample_is_as_likely_to_be_drawn():
    positions = torch.arange(40)
    batches = [(positions[:16],), (positions[16:],)]
    counts = torch.zeros(40)
    for seed in range(200):
        for (drawn,) in draw_samples(batches, 10, torch.Generator().manual_seed(seed)):
            counts[drawn] += 1
    assert counts.sum() == 200 * 10
    # Each sample is in with probability 1/4: mean 50, standard deviation 6.1; five of them.
    assert counts.min() > 19 and counts.max() < 81


@pytest.mark.parametrize("engine", ["rules", "vmap", "loop"])
def test_forced_engines_agree(engine):
    model, (x, y) = seeded(mlp), data()
    assert {s.engine for s in explain(model, (x, y), engine=engine).values()} == {engine}
    got = diagonal_fisher(model, [(x, y)], "exact", engine=engine)
    assert relative_error(got, loop_fisher(model, x, y, "exact")) < 1e-12


def test_progress_line_counts_samples(capsys):
    diagonal_fisher(seeded(mlp), [data()], progress=True)
    assert capsys.readouterr().err.startswith("\rFisher: 7 samples, 0 s")
    diagonal_fisher(seeded(mlp), [data()])
    assert capsys.readouterr().err == ""


def test_compiled_model_keeps_its_names():
    model, (x, y) = seeded(mlp), data()
    compiled = torch.compile(model, backend="eager")
    got = diagonal_fisher(compiled, [(x, y)])
    assert list(got) == [name for name, _ in compiled.named_parameters()]
    expected = loop_fisher(model, x, y, "predicted")
    assert (
        relative_error({n.removeprefix("_orig_mod."): f for n, f in got.items()}, expected) < 1e-12
    )


class TrainingNorm(nn.Module):
    """Insists on batch statistics in eval mode."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(6), nn.Linear(6, 4)

    def train(self, mode=True):
        super().train(mode)
        self.norm.train()
        return self

    def forward(self, x):
        return self.head(self.norm(x))


class Centred(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(x - x.mean(0))


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(F.dropout(x, 0.5, training=True))


class Dictionary(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return {"scores": self.head(x)}


def exploded():
    model = mlp()
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    return model


REJECTED = {
    "train-mode BatchNorm": (TrainingNorm, "BatchNorm on batch statistics"),
    "BatchNorm without statistics": (
        lambda: nn.Sequential(nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 4)),
        "BatchNorm on batch statistics",
    ),
    "interacting samples": (Centred, "its samples interact"),
    "noise": (Noisy, "its forward is random"),
    "dictionary": (Dictionary, r"must return logits \[N, C\], got dict"),
    "sequence of logits": (
        lambda: nn.Sequential(nn.Linear(6, 4), nn.Unflatten(1, (2, 2))),
        r"`class_dim` is needed: no axis fits outputs of shape \(7, 2, 2\)",
    ),
    "one logit": (lambda: nn.Linear(6, 1), "at least 2 classes, got 1"),
    "NaN": (exploded, "not finite for sample 0"),
    "frozen": (lambda: nn.Linear(6, 4).requires_grad_(False), "no parameter with requires_grad"),
}


@pytest.mark.parametrize(("build", "message"), REJECTED.values(), ids=REJECTED)
@pytest.mark.parametrize("engine", ["auto", "vmap", "loop"])
def test_rejected_models(build, message, engine):
    model = seeded(build).train()
    before = flags(model)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        diagonal_fisher(model, [data()], engine=engine)
    assert flags(model) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_non_finite_logit_names_the_sample():
    model, (x, y) = seeded(mlp), data(40)
    x[29, 2] = torch.inf
    with pytest.raises(ValueError, match="for sample 29 of `batches`"):
        diagonal_fisher(model, [(x[:16], y[:16]), (x[16:], y[16:])])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fisher_type": "true"}, "`fisher_type` must be one of 'predicted'"),
        ({"engine": "fast"}, "`engine` must be one of 'auto', 'rules', 'vmap', 'loop', got 'fast'"),
        ({"n_draws": 0}, "`n_draws` must be >= 1, got 0"),
        ({"n_draws": 2}, "`n_draws` enters fisher_type 'sampled' alone"),
        ({"max_samples": 0}, "`max_samples` must be >= 1, got 0"),
        ({"chunk_size": -1}, "`chunk_size` must be >= 1, got -1"),
        ({"criterion": F.cross_entropy}, "`criterion` enters the batched fisher types alone"),
        ({"fisher_type": "batched", "max_samples": 5}, "would change what fisher_type 'batched'"),
        ({"fisher_type": "batched", "positions": len}, "`positions` does not enter"),
        (
            {"fisher_type": "batched", "criterion": F.cross_entropy, "ignore_index": 0},
            "`class_dim` and `ignore_index` do not enter a `criterion`",
        ),
        ({"fisher_type": "batched", "targets": lambda b: b[1] + 9}, "takes no outputs .* of torch"),
        ({"fisher_type": "empirical", "targets": lambda b: b[1] + 9}, r"must be in \[0, 4\)"),
        ({"fisher_type": "empirical", "targets": lambda b: b[0]}, "must be class indices"),
    ],
)
def test_refused_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        diagonal_fisher(seeded(mlp), [data()], **options)


@pytest.mark.parametrize("kind", ["predicted", "batched"])
def test_no_batches(kind):
    with pytest.raises(ValueError, match="`batches` is empty"):
        diagonal_fisher(seeded(mlp), [], kind)


@pytest.mark.parametrize(("build", "engine"), [(Einsum, "rules"), (DataDependent, "vmap")])
def test_forced_engine_that_cannot(build, engine):
    with pytest.raises(ValueError, match=f"`engine` '{engine}' can't serve"):
        diagonal_fisher(seeded(build), [data()], engine=engine)
