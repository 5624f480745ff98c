"""A Fisher on disk says what it is of, and what does not fit is refused whole."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import ewc_plugin
from ewc_plugin import (
    DiagonalEWCPlugin,
    FisherType,
    QuadraticPenalty,
    bernoulli_score,
    diagonal_fisher,
    load_fisher,
    save_fisher,
)
from ewc_plugin.fisher.scores import BATCHED

safetensors = pytest.importorskip("safetensors.torch")
N, K, C = 9, 4, 3


def network(width=5):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(K, width), nn.ReLU(), nn.Linear(width, C))


def batches():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(N, K, generator=generator), torch.arange(N) % C
    return [(x[:5], y[:5]), (x[5:], y[5:])]


@pytest.fixture
def saved(tmp_path):
    model = network()
    fisher = diagonal_fisher(model, batches(), "exact")
    path = tmp_path / "fisher.safetensors"
    save_fisher(path, fisher, anchor=model, about={"data": "λ blobs", "epochs": 3})
    return path, model, fisher


@pytest.mark.parametrize("kind", [*FisherType, bernoulli_score])
def test_a_fisher_knows_its_type_and_samples(kind):
    fisher = diagonal_fisher(network(), batches(), kind)
    assert fisher.fisher_type == getattr(kind, "value", "bernoulli_score")
    assert fisher.n_samples == (None if kind in BATCHED else N)
    for again in (copy.deepcopy(fisher), pickle.loads(pickle.dumps(fisher))):
        assert (again.fisher_type, again.n_samples) == (fisher.fisher_type, fisher.n_samples)
        assert all(torch.equal(again[n], f) for n, f in fisher.items())
    part = diagonal_fisher(network(), batches(), max_samples=4)
    assert part.n_samples == 4


def test_everything_comes_back(saved):
    path, model, fisher = saved
    loaded = load_fisher(path, model, check_weights=True)
    assert loaded.keys() == fisher.keys()
    for name, tensor in fisher.items():
        assert torch.equal(loaded[name], tensor)
        assert torch.equal(loaded.anchor[name], model.get_parameter(name))
    assert (loaded.fisher_type, loaded.n_samples) == ("exact", N)
    assert loaded.about == {"data": "λ blobs", "epochs": 3}
    assert loaded.versions == {"ewc_plugin": ewc_plugin.__version__, "torch": torch.__version__}
    assert loaded.saved_at.endswith("+00:00")
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_penalty_of_it_is_that_of_the_fisher(saved):
    path, model, fisher = saved
    penalties = [QuadraticPenalty(), QuadraticPenalty()]
    plugin = DiagonalEWCPlugin(1.0)
    for penalty, F in zip(penalties, (fisher, load_fisher(path)), strict=True):
        penalty.consolidate(model, F)
    plugin.consolidate(model, load_fisher(path, model))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    first, second = (float(p(model).detach()) for p in penalties)
    assert first == second == float(plugin.penalty(model).detach()) > 0


def test_a_wrapped_model_is_the_same_model(saved):
    path, model, _ = saved
    compiled = torch.compile(model, backend="eager")
    assert load_fisher(path, compiled, check_weights=True).n_samples == N


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
@pytest.mark.parametrize("with_anchor", [True, False])
def test_the_fisher_of_a_wrapped_model_is_that_of_the_model(tmp_path, wrap, with_anchor):
    wrapped, path = wrap(network()), tmp_path / "f"
    fisher = diagonal_fisher(wrapped, batches(), "exact")
    save_fisher(path, fisher, anchor=wrapped if with_anchor else None)
    models = [network(), wrapped] if with_anchor else [wrapped]
    for model in models:
        loaded = load_fisher(path, model, check_weights=with_anchor)
        expected = dict(zip(dict(network().named_parameters()), fisher.values(), strict=True))
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[name], f) for name, f in expected.items())


def changed(model):
    with torch.no_grad():
        model[2].bias += 1e-7
    return model


OTHERS = {
    "another width": (lambda: network(6), r"'0.weight' is \(5, 4\) in the file, \(6, 4\)"),
    "a layer more": (
        lambda: network().append(nn.Linear(C, C)),
        "the file has no '3.bias'; the file has no '3.weight'",
    ),
    "a layer less": (lambda: network()[:2], "the model has no '2.bias'"),
}


@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.parametrize("weights", [None, False, True])
def test_another_model_is_refused_with_what_differs(saved, case, weights):
    make, message = OTHERS[case]
    with pytest.raises(ValueError, match=f"is the Fisher of another model: .*{message}"):
        load_fisher(saved[0], make(), check_weights=weights)


def test_other_weights_are_a_warning_an_error_or_accepted(saved):
    path, model = saved[0], changed(network())
    differ = r"is the Fisher of other weights than the model's: 1 of 4 parameters differ \('2.bias'"
    with pytest.warns(UserWarning, match=differ) as caught:
        loaded = load_fisher(path, model)
    assert caught[0].filename == __file__
    assert not torch.equal(loaded.anchor["2.bias"], model[2].bias)
    with pytest.raises(ValueError, match=differ):
        load_fisher(path, model, check_weights=True)
    load_fisher(path, model, check_weights=False)  # warnings are errors here
    load_fisher(path, network())
    load_fisher(path)


def test_weights_can_be_checked_only_where_they_were_saved(tmp_path):
    model, path = network(), tmp_path / "f"
    save_fisher(path, diagonal_fisher(model, batches()))
    assert load_fisher(path, model).anchor is None
    with pytest.raises(ValueError, match="has no weights; save it with `anchor=model`"):
        load_fisher(path, model, check_weights=True)
    with pytest.raises(ValueError, match="pass `model` too"):
        load_fisher(path, check_weights=True)


def cut(data):
    return data[:-20]


def flipped(data):
    return data[:-9] + bytes([data[-9] ^ 0x10]) + data[-8:]


def renamed(data):
    return data.replace(b"fisher/0.weight", b"fisher/9.weight")


def of_something_else(data):
    return safetensors.save({"a": torch.zeros(2)})


class Evil:
    def __reduce__(self):
        return exit, (3,)


DAMAGES = {
    "cut": (cut, "cannot be read as one"),
    "empty": (lambda data: b"", "cannot be read as one"),
    "a flipped bit": (flipped, "is damaged: its tensors are not those that were saved"),
    "a name": (renamed, "is damaged"),
    "another file": (of_something_else, "is a safetensors file of something else"),
    "a pickle": (lambda data: pickle.dumps(Evil()), "cannot be read as one"),
    "text": (lambda data: b"weight,1.0\n", "cannot be read as one"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_bad_file_is_one_clear_error(saved, case):
    path, (damage, message) = saved[0], DAMAGES[case]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        load_fisher(path)


def test_no_file_is_a_clear_error(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(ValueError, match="is no file"):
            load_fisher(path)


@pytest.mark.parametrize(
    ("fisher", "message"),
    [
        ({}, "not be empty"),
        ({1: torch.ones(2)}, "must map parameter names to tensors"),
        ({"w": torch.tensor([-1.0])}, r"`fisher\['w'\]` must be a tensor, finite and >= 0"),
        (
            {"w": torch.ones(2, dtype=torch.complex64)},
            "must be a tensor of real numbers, got torch",
        ),
        ({"w": torch.ones(2).to_sparse()}, r"`fisher\['w'\]` is sparse .* make it dense"),
        ({"w": torch.ones(2, device="meta")}, r"`fisher\['w'\]` is on the meta device"),
        ({"w": torch.tensor([torch.nan])}, r"`fisher\['w'\]` must"),
        ({"w": [1.0]}, r"`fisher\['w'\]` must"),
        ({"w": torch.ones(2)}, "`anchor` must have .* lacks 'w'"),
    ],
)
def test_what_is_no_fisher_is_not_saved(tmp_path, fisher, message):
    path = tmp_path / "f"
    with pytest.raises(ValueError, match=message):
        save_fisher(path, fisher, anchor={"v": torch.ones(2)})
    with pytest.raises(TypeError, match="`about` must hold what JSON can"):
        save_fisher(path, {"w": torch.ones(2)}, about={"a": object()})
    assert not list(tmp_path.iterdir())


def test_tensors_that_share_memory_or_lie_otherwise_are_saved(tmp_path):
    both = torch.arange(6.0).view(2, 3)
    fisher = {"a": both, "b": both.T, "c": both[0], "scalar": torch.tensor(2.0)}
    save_fisher(tmp_path / "f", fisher)
    loaded = load_fisher(tmp_path / "f")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in fisher.items())


def test_without_safetensors_the_error_says_what_to_install(tmp_path):
    code = "import sys; sys.modules['safetensors'] = sys.modules['safetensors.torch'] = None;"
    code += "import torch, ewc_plugin; ewc_plugin.save_fisher('f', {'w': torch.ones(1)})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert "ImportError: A Fisher is saved and loaded with safetensors" in done.stderr


def test_about_must_be_a_mapping(tmp_path):
    with pytest.raises(TypeError, match="`about` must be a mapping"):
        save_fisher(tmp_path / "f.safetensors", {"w": torch.ones(2)}, about="a word")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": nn.Linear}, "`model` must be an nn.Module or None, got <class"),
        ({"model": {}}, "`model` must be an nn.Module or None"),
        ({"check_weights": "no"}, "`check_weights` must be True, False or None, got 'no'"),
        ({"model": network().to("meta")}, "The model's `0.bias` is on the meta device"),
        ({"device": "meta"}, "`device` is 'meta', which cannot hold a tensor here"),
        ({"device": "nowhere"}, "`device` is 'nowhere', which cannot hold a tensor here"),
        ({"device": "cuda:999"}, "`device` is 'cuda:999', which cannot hold a tensor here"),
    ],
)
def test_what_cannot_be_loaded_for_is_named(saved, arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        load_fisher(saved[0], **arguments)


@pytest.mark.parametrize(
    ("anchor", "message"),
    [
        ([torch.ones(2)], "`anchor` must be a model, or its parameters by name, got list"),
        ({"w": torch.ones(2).numpy()}, r"`anchor\['w'\]` must be a tensor, got ndarray"),
        ({"w": torch.ones(2, device="meta")}, r"`anchor\['w'\]` is on the meta device"),
    ],
)
def test_what_is_no_anchor_is_not_saved(tmp_path, anchor, message):
    with pytest.raises((TypeError, ValueError), match=message):
        save_fisher(tmp_path / "f", {"w": torch.ones(2)}, anchor=anchor)
