"""Models, loaders and surroundings that once gave a wrong Fisher, or a crash, without a word."""

import argparse
import random
from collections import UserDict, deque
from copy import deepcopy
from itertools import count
from queue import Queue

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import register_pytree_node
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from ewc_plugin.fisher import accumulate
from ewc_plugin.fisher.diagonal import diagonal_fisher, explain
from ewc_plugin.fisher.likelihoods import bernoulli_score, gaussian_score
from ewc_plugin.fisher.rules.registry import RULES
from ewc_plugin.fisher.tracing.layer_calls import TracedCall
from support.problems import mlp
from support.reference import loop_fisher, relative_error


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def built(make):
    torch.manual_seed(0)
    return make().double().eval()


def in_batches(size, *parts):
    return list(zip(*(part.split(size) for part in parts), strict=True))


LABELS = torch.arange(12) % 4


class AttendsOverTheBatch(nn.Module):
    """A TransformerEncoderLayer without `batch_first` on [N, T, D]."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.TransformerEncoderLayer(6, 2, 8), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.body(x).mean(1))


class DividesByTheLargest(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x):
        h = self.first(x).relu()
        return self.head(h / (1 + h.max()))


class OneLargeLogit(nn.Module):
    """The batch's mean enters the small logits, beside a large one."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(x + x.mean(0)) + torch.tensor([-1e5, 0, 0, 0])


class Experts(nn.Module):
    """Each takes as many samples as its capacity, which grows slower than the batch."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(6, 3), nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        choice, rows = self.gate(x).argmax(1), []
        taken = [0, 0, 0]
        for row, expert in zip(x, choice.tolist(), strict=True):
            taken[expert] += 1
            rows.append(self.experts[expert](row) if taken[expert] <= 2 else row)
        return self.head(torch.stack(rows))


class Unpadded(nn.Module):
    """Runs on the tokens that count alone, all samples' in one long list."""

    def __init__(self):
        super().__init__()
        self.token, self.head = nn.Linear(3, 5), nn.Linear(5, 4)

    def forward(self, x, mask):
        out = x.new_zeros(*x.shape[:2], 5)
        out[mask] = self.token(x[mask]).tanh()
        return self.head(out.sum(1))


@pytest.mark.parametrize("rows", [1, 2])
def test_rows_per_sample_are_not_judged_by_their_total(rows):
    model, x = built(Unpadded), normal(40, 4, 3)
    lengths = torch.full((40,), rows)
    lengths[20], lengths[30] = rows - 1, rows + 1  # after the first ones, with the same total
    mask = torch.arange(4) < lengths[:, None]
    got = diagonal_fisher(model, [(x, mask)], forward=lambda m, b: m(*b))
    expected = loop_fisher(model, (x, mask), None, "predicted", lambda m, p: m(*p))
    assert relative_error(got, expected) < 1e-12


INTERACTING = {
    "attention": (AttendsOverTheBatch, (5, 6)),
    "largest": (DividesByTheLargest, (6,)),
    "one large logit": (OneLargeLogit, (6,)),
    "experts": (Experts, (6,)),
}


@pytest.mark.parametrize("kind", ["predicted", "empirical", "exact"])
@pytest.mark.parametrize(("make", "shape"), INTERACTING.values(), ids=INTERACTING)
def test_samples_of_a_loader_of_ones_are_not_joined_where_they_would_interact(make, shape, kind):
    model, x = built(make), normal(12, *shape)
    got = diagonal_fisher(model, in_batches(1, x, LABELS), kind)
    assert relative_error(got, loop_fisher(model, x, LABELS, kind)) < 1e-12


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize(("make", "shape"), INTERACTING.values(), ids=INTERACTING)
def test_samples_that_interact_in_the_loaders_batches_are_refused(make, shape, equal):
    x = normal(40, *shape)
    if equal:  # the first ones, which agree with themselves
        x[:3] = x[0]
    with pytest.raises(ValueError, match="interact"):
        diagonal_fisher(built(make), [(x,)])


def test_samples_that_differ_late_are_compared_then():
    x = normal(1, 5, 6).repeat(40, 1, 1)
    x[30:] = normal(10, 5, 6, seed=1)
    with pytest.raises(ValueError, match="interact"):
        diagonal_fisher(built(AttendsOverTheBatch), in_batches(10, x))


def test_wrong_squares_in_a_chunk_are_found_and_served_by_the_loop(monkeypatch):
    watch = TracedCall.watch  # sees what the chunk that really runs gives the rules

    def wrong(self, g, layout, N, *more):
        watch(self, g * (1 + (N > 3)), layout, N, *more)

    monkeypatch.setattr(TracedCall, "watch", wrong)
    model, x = built(mlp), normal(12, 6)
    with pytest.warns(UserWarning, match="not those of the sample loop, which serves these"):
        got = diagonal_fisher(model, [(x,)])
    assert relative_error(got, loop_fisher(model, x, LABELS, "predicted")) < 1e-12


@pytest.mark.parametrize("gap", [44, 59, 60, 80])
def test_a_sure_network_whose_squares_underflow_passes_the_audit(gap, recwarn):
    """As after many iterations on two classes: float32 has few digits of squares below 1e-38."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU())
    model.append(nn.Linear(30, 2))
    x = torch.rand(64, 20)
    with torch.no_grad():
        factor = gap / (model(x)[:, 0] - model(x)[:, 1]).abs().mean()
        model[-1].weight *= factor
        model[-1].bias *= factor
    diagonal_fisher(model, [(part,) for part in x.split(32)])
    assert not recwarn.list


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.first, self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 4)
        self.reentrant = reentrant

    def forward(self, x):
        h = self.first(x)
        h = checkpoint(lambda t: self.body(t).tanh(), h, use_reentrant=self.reentrant)
        return self.head(h)


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_models(reentrant, engine):
    model, x = built(lambda: Checkpointed(reentrant)), normal(7, 6)
    plain = built(lambda: Checkpointed(reentrant))
    plain.forward = lambda x: plain.head(plain.body(plain.first(x)).tanh())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    got = diagonal_fisher(model, [(x,)], "exact", engine=engine)
    assert relative_error(got, loop_fisher(plain, x, None, "exact")) < 1e-12
    batched = [diagonal_fisher(m, [(x, LABELS[:7])], "batched") for m in (model, plain)]
    assert relative_error(*batched) < 1e-12
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRU(3, 5, batch_first=True), nn.Linear(5, 4)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True)
        return self.head(self.cell(packed)[1][0])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_sequences_sorted_by_length_within_each_batch(size):
    model, x = built(Packed), normal(12, 6, 3)
    drawn = [torch.randperm(6)[:size].sort(descending=True).values + 1 for _ in range(12 // size)]
    lengths = torch.cat(drawn)
    got = diagonal_fisher(
        model,
        in_batches(size, x, LABELS, lengths),
        "empirical",
        forward=lambda m, b: m(b[0], b[2]),
    )
    expected = loop_fisher(model, (x, lengths), LABELS, "empirical", lambda m, p: m(*p))
    assert relative_error(got, expected) < 1e-12


class FixedBatch(nn.Module):
    """Its state was made for the loader's batches."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.RNN(3, 5, batch_first=True), nn.Linear(5, 4)
        self.register_buffer("h", torch.zeros(1, 4, 5))

    def forward(self, x):
        return self.head(self.cell(x, self.h)[0][:, -1])


def test_a_state_made_for_the_loaders_batch_size():
    model, x = built(FixedBatch), normal(12, 5, 3)
    got = diagonal_fisher(model, in_batches(4, x, LABELS), "exact")
    free = deepcopy(model)
    free.h = torch.zeros(1, 1, 5).double()
    assert relative_error(got, loop_fisher(free, x, LABELS, "exact")) < 1e-12


class OneBuffer:
    """A loader that hands the same memory out again and again."""

    def __init__(self, x, y, size):
        self.x, self.y, self.size = x, y, size

    def __iter__(self):
        bx, by = self.x[: self.size].clone(), self.y[: self.size].clone()
        for start in range(0, len(self.x), self.size):
            bx.copy_(self.x[start : start + self.size])
            by.copy_(self.y[start : start + self.size])
            yield bx, by
            bx.fill_(torch.nan)


@pytest.mark.parametrize("size", [1, 2, 6])
@pytest.mark.parametrize("chunk_size", [1, 4, None])
def test_loaders_that_reuse_their_memory(size, chunk_size):
    model, x = built(mlp), normal(12, 6)
    got = diagonal_fisher(model, OneBuffer(x, LABELS, size), "empirical", chunk_size=chunk_size)
    assert relative_error(got, loop_fisher(model, x, LABELS, "empirical")) < 1e-12


@pytest.mark.parametrize("fisher_type", ["empirical", "class_mean_empirical"])
def test_a_chunk_that_is_computed_again_is_as_it_was(fisher_type):
    model, x = built(mlp), normal(12, 6)
    tried = []

    def forward(m, batch):
        tried.append(len(batch[0]))
        if (batch[0] == x[9]).all(1).any() and tried.count(3) < 5 and len(batch[0]) == 3:
            raise torch.OutOfMemoryError("out of memory")  # all before is computed once more
        return m(batch[0])

    batches = OneBuffer(x, LABELS, 6)
    got = diagonal_fisher(model, batches, fisher_type, chunk_size=3, forward=forward)
    want = diagonal_fisher(model, [(x, LABELS)], fisher_type)
    assert relative_error(got, want) < 1e-12


@pytest.mark.parametrize("also", [1.0, 0.0], ids=["as in the probe", "not in the probe"])
def test_a_model_that_works_in_place_leaves_the_batches_alone(also):
    model, x = built(mlp), normal(12, 6)
    x[:3, 0], x[3:, 0] = also, 1.0

    def forward(m, batch):
        if (rows := batch[0][:, 0] == 1).any():
            batch[0][rows, 1] = batch[0][rows, 1].clamp(-1e-3, 1e-3)
        return m(batch[0])

    given = [(x[:3].clone(), LABELS[:3]), (x[3:8].clone(), LABELS[3:8])]
    given += [(x[8:].clone(), LABELS[8:])]
    before = [batch[0].clone() for batch in given]
    got = diagonal_fisher(model, given, "empirical", chunk_size=4, forward=forward)
    clamped = x.clone()
    clamped[:, 1] = torch.where(x[:, 0] == 1, x[:, 1].clamp(-1e-3, 1e-3), x[:, 1])
    assert relative_error(got, loop_fisher(model, clamped, LABELS, "empirical")) < 1e-12
    assert all(torch.equal(a[0], b) for a, b in zip(given, before, strict=True))


@pytest.mark.parametrize(
    "extra",
    [
        lambda n, i: np.arange(n),
        lambda n, i: [f"sample {i + j}" for j in range(n)],
        lambda n, i: None,
        lambda n, i: i,
        lambda n, i: object(),
        lambda n, i: {"rows": np.ones((n, 2)), "name": "batch"},
    ],
    ids=["array", "strings", "None", "number", "object", "mapping"],
)
def test_what_else_a_batch_holds_passes_through(extra):
    model, x = built(mlp), normal(12, 6)
    batches = [(x[i : i + 4], LABELS[i : i + 4], extra(4, i)) for i in (0, 4, 8)]
    got = diagonal_fisher(model, batches, "empirical", chunk_size=5)
    assert relative_error(got, loop_fisher(model, x, LABELS, "empirical")) < 1e-12


def test_a_list_of_strings_is_cut_with_its_samples():
    words = ["a", "bb", "ccc", "dddd", "eeeee"]
    model, x = built(mlp), normal(6, 6)

    def forward(m, batch):
        return m(torch.stack([x[len(word)] for word in batch[0]]))

    batches = [(words[:3], LABELS[:3]), (words[3:], LABELS[3:5])]
    got = diagonal_fisher(model, batches, forward=forward)
    assert relative_error(got, loop_fisher(model, x[1:], LABELS, "predicted")) < 1e-12


class SumsByLength(nn.Module):
    """The lengths are no tensor."""

    def __init__(self):
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.ones(6)), nn.Linear(6, 4)

    def forward(self, x, lengths):
        rows = [row[: lengths[i]].sum(0) for i, row in enumerate(x)]
        return self.head((torch.stack(rows) * self.scale).tanh())


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("kind", [list, tuple, np.array])
@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_values_of_samples_are_cut_with_them(engine, kind, chunk_size):
    model, x, lengths = built(SumsByLength), normal(12, 5, 6), torch.arange(12) // 3 + 1

    def forward(m, batch):
        assert type(batch[2]) is type(kind([]))
        return m(batch[0], batch[2])

    batches = [(x[i : i + 6], LABELS[i : i + 6], kind(lengths[i : i + 6].tolist())) for i in (0, 6)]
    got = diagonal_fisher(
        model, batches, "empirical", forward=forward, chunk_size=chunk_size, engine=engine
    )
    expected = loop_fisher(model, (x, lengths), LABELS, "empirical", lambda m, p: m(*p))
    assert relative_error(got, expected) < 1e-12


def test_vmap_that_would_give_all_samples_the_values_of_the_first_is_refused():
    model, x = built(SumsByLength), normal(12, 5, 6)
    batches = [(x, LABELS, [1, 2, 3] * 4)]
    with pytest.raises(ValueError, match="`engine` 'vmap' can't serve .* no tensor"):
        diagonal_fisher(model, batches, forward=lambda m, b: m(b[0], b[2]), engine="vmap")


class Pair:
    def __init__(self, x, y):
        self.x, self.y = x, y


register_pytree_node(Pair, lambda pair: ([pair.x, pair.y], None), lambda xy, _: Pair(*xy))


def test_a_class_that_is_registered_as_a_pytree_is_a_container():
    model, x = built(mlp), normal(12, 6)
    got = diagonal_fisher(
        model,
        [Pair(*xy) for xy in in_batches(5, x, LABELS)],
        "empirical",
        forward=lambda m, pair: m(pair.x),
        targets=lambda pair: pair.y,
    )
    assert relative_error(got, loop_fisher(model, x, LABELS, "empirical")) < 1e-12


class Image(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 4)

    def forward(self, x, size):
        height, width = size
        return self.head(x) * (height - width)


@pytest.mark.parametrize("size", [(5, 3), [5, 3], torch.Size((5, 3))], ids=lambda s: type(s))
@pytest.mark.parametrize("n", [5, 1])
def test_a_pair_of_numbers_is_shared_where_other_batches_say_so(size, n):
    model, x = built(Image), normal(12, 6)
    batches = [(part, label, size) for part, label in in_batches(n, x[:10], LABELS[:10])]
    batches.append((x[10:], LABELS[10:], size))
    got = diagonal_fisher(
        model, batches, "empirical", forward=lambda m, b: m(b[0], b[2]), chunk_size=3
    )
    expected = loop_fisher(model, x, LABELS, "empirical", lambda m, p: m(p[0], (5, 3)))
    assert relative_error(got, expected) < 1e-12


def test_a_pair_of_numbers_that_may_have_been_cut_is_refused():
    model, x = built(mlp), normal(12, 6)
    batches = [(part, label, (5, 3)) for part, label in in_batches(2, x, LABELS)]
    batches.append((x[:5], LABELS[:5], (5, 3)))
    with pytest.raises(ValueError, match="has 2 values for 5 samples.*`forward`"):
        diagonal_fisher(model, batches)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_features(layout):
    model, x = built(mlp), normal(12, 6).relu()
    batches = [(x[i : i + 4].to_sparse(layout=layout), LABELS[i : i + 4]) for i in (0, 4, 8)]
    got = diagonal_fisher(model, batches, "empirical", forward=lambda m, b: m(b[0].to_dense()))
    assert relative_error(got, loop_fisher(model, x, LABELS, "empirical")) < 1e-12


@pytest.mark.parametrize("kind", ["empirical", "batched"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_empty_batches_count_for_nothing(kind, place):
    model, x = built(mlp), normal(8, 6)
    batches = in_batches(4, x, LABELS[:8])
    expected = diagonal_fisher(model, batches, kind)
    got = diagonal_fisher(model, [*batches[:place], (x[:0], LABELS[:0]), *batches[place:]], kind)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_head_without_a_unit():
    class NoUnit(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.later = nn.Linear(6, 4), nn.Linear(6, 0)

        def forward(self, x):
            return torch.cat([self.head(x), self.later(x)], 1)

    model, x = built(NoUnit), normal(7, 6)
    got = diagonal_fisher(model, [(x,)])
    assert got["later.weight"].shape == (0, 6)
    torch.testing.assert_close(
        got["head.weight"], loop_fisher(model.head, x, None, "predicted")["weight"]
    )


def test_endless_loaders_are_read_as_far_as_needed():
    read = []

    def endless():
        for i in count():
            read.append(i)
            yield normal(4, 6, seed=i), LABELS[:4]

    model = built(mlp)
    got = diagonal_fisher(model, endless(), "empirical", max_samples=10)
    x = torch.cat([normal(4, 6, seed=i) for i in range(3)])[:10]
    y = LABELS[:4].repeat(3)[:10]
    assert relative_error(got, loop_fisher(model, x, y, "empirical")) < 1e-12
    assert len(read) <= 3


def test_a_subset_of_a_loader_reads_no_other_sample():
    read = []

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 1000

        def __getitem__(self, i):
            read.append(i)
            return normal(6, seed=i), i % 4

    diagonal_fisher(built(mlp), DataLoader(Rows(), batch_size=4, shuffle=True), max_samples=10)
    assert len(read) == len(set(read)) == 10
    assert max(read) > 100


class Remembers(nn.Module):
    """Stores what it saw, counts, and fills a list."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.utils.weight_norm(nn.Linear(6, 5)), nn.Linear(5, 4)
        self.scale = nn.Parameter(torch.ones(5))
        self.features, self.calls, self.seen = None, 0, []
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        h = self.first(x).tanh() * self.scale
        self.features, self.calls = h, self.calls + 1
        self.seen.append(h)
        self.count += len(x)
        return self.head(h)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_models_that_remember_are_left_as_found(engine, tmp_path):
    model, x = built(Remembers), normal(7, 6)
    diagonal_fisher(model, [(x,)], engine=engine)
    diagonal_fisher(model, [(x,)], "batched", criterion=lambda out, y: out.sum(), targets=len)
    assert (model.features, model.calls, model.seen) == (None, 0, [])
    assert model.count == 0
    torch.save(model, tmp_path / "model.pt")
    torch.save(model.state_dict(), tmp_path / "state.pt")


class Memory:
    """What a model holds that is no module: a cache, a counter, a tensor that it changes."""

    def __init__(self):
        self.calls, self.last, self.seen, self.mean = 0, None, [], torch.zeros(4)


class RemembersElsewhere(nn.Module):
    """Keeps its state in an object of its own class, and answers by it."""

    def __init__(self):
        super().__init__()
        self.head, self.memory = nn.Linear(6, 4), Memory()

    def forward(self, x):
        memory = self.memory
        memory.calls += 1
        memory.last = self.head(x)
        memory.mean += memory.last.detach().mean(0)
        return memory.last * (1 if memory.calls < 3 else 2) + 0 * memory.mean


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("n_batches", [1, 4])
def test_state_in_an_object_that_a_module_holds_is_put_back(engine, n_batches):
    model, x = built(RemembersElsewhere), normal(8, 6)
    batches = in_batches(8 // n_batches, x, LABELS[:8])
    got = diagonal_fisher(model, batches, "empirical", engine=engine)
    want = loop_fisher(model.head, x, LABELS[:8], "empirical")
    want = {f"head.{name}": f for name, f in want.items()}
    assert relative_error(got, want) < 1e-12
    assert (model.memory.calls, model.memory.last, model.memory.seen) == (0, None, [])
    assert not model.memory.mean.any()


class Slotted:
    """What is inside of another object, has no attributes but these, and closes a circle."""

    __slots__ = ("calls", "last", "others")

    def __init__(self):
        self.calls, self.others = 0, [self]


class Listing(list):
    """A list with an attribute."""

    calls = 0


class Holder:
    """An object with containers and further objects in it, beside what cannot be copied."""

    def __init__(self, module):
        self.seen, self.counts, self.users = [], {"calls": 0}, UserDict()
        self.recent, self.listing = deque(maxlen=3), Listing()
        self.inner, self.handle = Slotted(), (each for each in ())
        self.backward = WithModule(module)


class WithModule:
    def __init__(self, module):
        self.module, self.seen = module, []


class RemembersInObjects(nn.Module):
    """Adds to its logits what it remembers in objects, in a list of them too."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 4)
        self.holder = Holder(self.head)
        self.stages = [Slotted(), self.holder, self]

    def forward(self, x):
        out, holder = self.head(x), self.holder
        places = [holder.seen, holder.recent, holder.listing, holder.backward.seen]
        total = sum(map(len, places)) + holder.counts["calls"] + len(holder.users)
        for slotted in (holder.inner, self.stages[0]):
            total += slotted.calls
            slotted.calls, slotted.last = slotted.calls + 1, out
        for place in places:
            place.append(out)
        holder.listing.calls += 1
        holder.counts["calls"] += 1
        holder.users[total] = out
        return out * (1 + total)

    def state(self):
        h = self.holder
        lists = [h.seen, [*h.recent], [*h.listing], h.backward.seen, h.users.data]
        slots = [(s.calls, hasattr(s, "last")) for s in (h.inner, self.stages[0])]
        return lists, h.counts, vars(h.listing), slots


@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_state_inside_of_objects_is_put_back(engine):
    model, x = built(RemembersInObjects), normal(8, 6)
    got = diagonal_fisher(model, in_batches(4, x, LABELS[:8]), "empirical", engine=engine)
    want = loop_fisher(model.head, x, LABELS[:8], "empirical")
    assert relative_error(got, {f"head.{name}": f for name, f in want.items()}) < 1e-12
    assert model.state() == ([[], [], [], [], {}], {"calls": 0}, {}, [(0, False)] * 2)


class DrawsFromItsOwn(nn.Module):
    """Turns its input around where a number from a generator of its own is small."""

    def __init__(self, draw, chance=0.0):
        super().__init__()
        self.head, self.draw, self.chance = nn.Linear(6, 4), [draw], chance

    def forward(self, x):
        return self.head(x.flip(1) if float(self.noise()) < self.chance else x)

    def noise(self):
        (g,) = self.draw
        return torch.rand((), generator=g) if isinstance(g, torch.Generator) else g.random()


GENERATORS = pytest.mark.parametrize(
    "make",
    [
        lambda: torch.Generator().manual_seed(3),
        lambda: np.random.default_rng(3),
        lambda: np.random.RandomState(3),
        lambda: random.Random(3),
    ],
    ids=["torch", "numpy", "numpy's old one", "Python"],
)


@GENERATORS
def test_generators_of_a_models_own_are_put_back(make):
    model, x = built(lambda: DrawsFromItsOwn(make())), normal(8, 6)
    got = diagonal_fisher(model, in_batches(4, x))
    assert relative_error(got, loop_fisher(model, x, None, "predicted")) < 1e-12
    model = built(lambda: DrawsFromItsOwn(make()))
    diagonal_fisher(model, in_batches(4, x))
    assert model.noise() == DrawsFromItsOwn(make()).noise()


@GENERATORS
def test_rare_noise_of_a_models_own_generator_is_refused(make):
    model = built(lambda: DrawsFromItsOwn(make(), chance=0.05))
    with pytest.raises(ValueError, match="two outputs|other logits alone"):
        diagonal_fisher(model, in_batches(4, normal(1000, 6)), chunk_size=4)


class WithSlot:
    __slots__ = ("number",)


class Hidden(WithSlot):
    __slots__ = ()
    number = property(lambda self: 3)


class CountsInAnArray(nn.Module):
    """Holds what is awkward to put back, and an array that it counts in."""

    def __init__(self):
        super().__init__()
        self.head, self.calls, self.bits = nn.Linear(6, 4), np.zeros(3), np.random.PCG64(3)
        self.system, self.hidden = random.SystemRandom(), Hidden()
        self.register_buffer("edges", torch.eye(3).to_sparse())

    def forward(self, x):
        self.calls += 1
        self.bits.random_raw()
        return self.head(x) * float(self.calls[0])


def test_arrays_are_put_back_and_what_cannot_be_is_left():
    model, x = built(CountsInAnArray), normal(8, 6)
    got = diagonal_fisher(model, in_batches(4, x))
    want = loop_fisher(model.head, x, None, "predicted")
    assert relative_error(got, {f"head.{name}": f for name, f in want.items()}) < 1e-12
    assert model.calls.tolist() == [0, 0, 0]
    assert model.bits.random_raw() == np.random.PCG64(3).random_raw()


class Locked:
    """Shared with a thread, so that it is not for a forward pass to put back."""

    def __init__(self):
        self.queue = Queue()


def test_what_threads_share_is_left_to_them():
    model = built(mlp)
    model.logger = Locked()

    def forward(model, batch):
        model.logger.queue.put(0)
        return model(batch[0])

    diagonal_fisher(model, [(normal(4, 6),)], forward=forward)
    queue = model.logger.queue
    assert queue.qsize() == queue.unfinished_tasks > 0


class WritesUnseen(nn.Module):
    """Changes a buffer and a parameter through `.data`, which leaves their version counters."""

    def __init__(self):
        super().__init__()
        self.head, self.shift = nn.Linear(6, 4), nn.Parameter(torch.ones(4))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x):
        out = self.head(x) * self.scale + self.shift
        self.scale.data.mul_(1.0001)
        self.shift.data.mul_(1.0001)
        return out


@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_small_tensors_written_to_through_data_are_put_back_between_passes(engine):
    model, x = built(WritesUnseen), normal(12, 6)
    start = deepcopy(model.state_dict())
    got = diagonal_fisher(model, in_batches(2, x, LABELS), "empirical", engine=engine)
    assert all(torch.equal(t, start[name]) for name, t in model.state_dict().items())

    def forward(x):
        model.load_state_dict(start)
        return WritesUnseen.forward(model, x)

    model.forward = forward
    want = loop_fisher(model, x, LABELS, "empirical")
    assert relative_error(got, want) < 1e-12


class WritesToItsMemory(nn.Module):
    """Returns a view of a buffer that it writes its logits to."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 4)
        self.register_buffer("out", torch.zeros(64, 4))

    def forward(self, x):
        self.out = self.out.detach()
        self.out[: len(x)] = self.head(x)
        return self.out[: len(x)]


@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_logits_that_are_a_view_of_a_buffer(engine):
    model, x = built(WritesToItsMemory), normal(12, 6)
    got = diagonal_fisher(model, in_batches(6, x, LABELS), "empirical", engine=engine)
    want = loop_fisher(model.head, x, LABELS, "empirical")
    assert relative_error(got, {f"head.{name}": f for name, f in want.items()}) < 1e-12
    assert not model.out.any()


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
def test_nested_tensors_are_refused(layout):
    nested = torch.nested.nested_tensor([normal(2, 6), normal(5, 6)], layout=layout)
    with pytest.raises(TypeError, match="`batches` holds a nested tensor"):
        diagonal_fisher(built(mlp), [(nested, LABELS[:2])])


class Hooks(nn.Module):
    """Installs hooks at its first forward pass, each of which doubles the logits."""

    def __init__(self):
        super().__init__()
        self.head, self.installed = nn.Linear(6, 4), False

    def forward(self, x):
        if not self.installed:
            self.installed = True
            self.head.register_forward_hook(lambda module, args, out: 2 * out)
            self.head.register_forward_pre_hook(lambda module, args, kw: None, with_kwargs=True)
            self.head.register_full_backward_pre_hook(lambda module, grad: None)
            self.head.register_state_dict_pre_hook(lambda module, prefix, keep_vars: None)
        return self.head(x)


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("used_before", [False, True])
def test_hooks_that_a_first_forward_pass_installs_do_not_pile_up(engine, used_before):
    model, x = built(Hooks), normal(8, 6)
    if used_before:
        model(x)
    names = [name for name in vars(model.head) if "hooks" in name]
    found = {name: getattr(model.head, name).copy() for name in names}
    got = diagonal_fisher(model, in_batches(4, x, LABELS[:8]), "empirical", engine=engine)
    assert {name: getattr(model.head, name) for name in names} == found
    want = loop_fisher(model, x, LABELS[:8], "empirical")
    assert relative_error(got, want) < 1e-12


class RemembersDeeply(nn.Module):
    """Keeps what it saw inside of other containers, and changes a tensor in a list."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 4)
        self.recent, self.seen = deque(maxlen=3), {"all": [], "of": ({},)}
        self.averages = [torch.zeros(4)]

    def forward(self, x):
        out = self.head(x) + self.averages[0]
        self.recent.append(out)
        self.seen["all"].append(out)
        self.seen["of"][0][len(x)] = out
        self.averages[0] += out.detach().mean(0)
        return out


@pytest.mark.parametrize("kind", ["predicted", "class_mean", "batched"])
def test_models_that_remember_inside_of_containers_are_left_as_found(kind):
    model, x = built(RemembersDeeply), normal(12, 6)
    diagonal_fisher(model, in_batches(4, x, LABELS), kind)
    assert (list(model.recent), model.seen) == ([], {"all": [], "of": ({},)})
    assert not model.averages[0].any()


@pytest.mark.parametrize(
    "wrap",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
        nn.utils.spectral_norm,
    ],
    ids=["weight_norm", "spectral_norm", "prune", "old spectral_norm"],
)
def test_reparametrised_layers_can_be_copied_afterwards(wrap):
    model = built(lambda: nn.Sequential(wrap(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 4)))
    x = normal(7, 6)
    got = diagonal_fisher(model, [(x,)])
    assert relative_error(got, loop_fisher(model, x, None, "predicted")) < 1e-12
    with torch.no_grad():
        model(x)
        deepcopy(model)


def test_batched_in_train_mode_leaves_buffers():
    class AlwaysTraining(nn.BatchNorm1d):
        def train(self, mode=True):
            return super().train(True)

    model = built(lambda: nn.Sequential(AlwaysTraining(6), nn.Linear(6, 4))).train()
    before = deepcopy(model.state_dict())
    diagonal_fisher(model, [(normal(7, 6), LABELS[:7])], "batched")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["predicted", "batched"])
def test_no_global_random_state_moves(kind):
    loader = DataLoader(TensorDataset(normal(12, 6), LABELS), batch_size=4, shuffle=True)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    diagonal_fisher(built(mlp), loader, kind)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    diagonal_fisher(built_without_seed(), loader, kind)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()


def built_without_seed():
    with torch.random.fork_rng():
        return built(mlp)


@pytest.mark.parametrize("kind", ["predicted", "empirical", "sampled", "exact", "batched"])
@pytest.mark.parametrize("ambient", ["inference", "meta", "float64"])
def test_what_is_ambient_changes_nothing(kind, ambient):
    model, x = built(mlp).float(), normal(12, 6).float()
    batches = in_batches(5, x, LABELS)
    expected = diagonal_fisher(model, batches, kind)
    dtype = torch.get_default_dtype()
    try:
        if ambient == "inference":
            with torch.inference_mode():
                batches = [(a.clone(), b.clone()) for a, b in batches]
                got = diagonal_fisher(model, batches, kind)
        elif ambient == "meta":
            with torch.device("meta"):
                got = diagonal_fisher(model, batches, kind)
        else:
            torch.set_default_dtype(torch.float64)
            got = diagonal_fisher(model, batches, kind)
    finally:
        torch.set_default_dtype(dtype)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=0)
        assert not got[name].is_inference()


def test_probabilities_are_refused():
    model = built(lambda: nn.Sequential(nn.Linear(6, 4), nn.Softmax(1)))
    x = normal(7, 6)
    with pytest.raises(ValueError, match="returns probabilities"):
        diagonal_fisher(model, [(x,)])
    got = diagonal_fisher(model, [(x,)], forward=lambda m, b: m(b[0]).log())
    expected = loop_fisher(model, x, None, "predicted", lambda m, p: m(p[0]).log())
    assert relative_error(got, expected) < 1e-12


class Features(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.body, self.head, self.wrap = nn.Linear(6, 5), nn.Linear(5, 4), wrap

    def forward(self, x):
        h = self.body(x).tanh()
        return self.wrap(h, self.head(h))


def test_a_tuple_is_never_guessed():
    with pytest.raises(ValueError, match=r"got tuple for a batch of a tuple of Tensor. Pass `for"):
        diagonal_fisher(built(lambda: Features(lambda h, z: (h, z))), [(normal(7, 6),)])


def test_logits_of_an_output_and_a_mapping_are_found():
    model, x = built(lambda: Features(lambda h, z: {"hidden": h, "logits": z})), normal(7, 6)
    expected = loop_fisher(model, x, LABELS, "empirical", lambda m, p: m(p[0])["logits"])
    for batch in ((x, LABELS[:7]), {"x": x, "labels": LABELS[:7]}):
        got = diagonal_fisher(model, [batch], "empirical")
        assert relative_error(got, expected) < 1e-12
    got = diagonal_fisher(model, [x])
    expected = loop_fisher(model, x, None, "predicted", lambda m, p: m(p[0])["logits"])
    assert relative_error(got, expected) < 1e-12


def test_words_for_missing_labels():
    for batch in (normal(7, 6), {"input": normal(7, 6)}):
        with pytest.raises(ValueError, match=r"`batches` must yield \(x, y, ...\) or mappings"):
            diagonal_fisher(built(mlp), [batch], "empirical")


def test_words_for_a_given_forward():
    with pytest.raises(ValueError, match=r"`forward` must return logits .* Pick them out"):
        diagonal_fisher(built(mlp), [(normal(7, 6),)], forward=lambda m, b: (m(b[0]),))


def test_complex_and_other_parameters_without_a_fisher_are_refused_at_once():
    model = nn.Linear(6, 4, dtype=torch.complex64)
    with pytest.raises(ValueError, match=r"complex \(weight, bias\)"):
        diagonal_fisher(model, iter(()))
    with torch.inference_mode():
        model = nn.Linear(6, 4)
    with pytest.raises(ValueError, match="an inference tensor"):
        diagonal_fisher(model, iter(()))
    with pytest.raises(ValueError, match="on the meta device"):
        diagonal_fisher(nn.Linear(6, 4, device="meta"), iter(()))
    model = nn.Linear(6, 4)
    model.weight = nn.Parameter(model.weight.detach().to_sparse())
    with pytest.raises(ValueError, match=r"sparse \(weight\).* Make it dense"):
        diagonal_fisher(model, iter(()))
    with pytest.raises(TypeError, match=r"`model` must be an nn.Module, got NoneType"):
        diagonal_fisher(None, iter(()))


OTHER = nn.Linear(6, 4).double()


@pytest.mark.parametrize("kind", ["predicted", "exact", "class_mean"])
@pytest.mark.parametrize(
    "forward",
    [
        torch.no_grad()(lambda model, batch: model(batch[0])),
        lambda model, batch: model(batch[0]).detach(),
        lambda model, batch: OTHER(batch[0]),
    ],
)
def test_outputs_that_depend_on_no_parameter_are_told(forward, kind):
    with pytest.warns(UserWarning, match="depend on no parameter with requires_grad"):
        fisher = diagonal_fisher(built(mlp), [(normal(7, 6),)], kind, forward=forward)
    assert not any(bool(f.any()) for f in fisher.values())


class Merging(nn.Module):
    """Low-rank matrices that `eval()` adds to the weight, as LoRA's do."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(6, 4)
        self.A, self.B = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(4, 2))
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            self.base.weight.data += (-1 if mode else 1) * (self.B @ self.A).data
            self.merged = not mode
        return self

    def forward(self, x):
        out = self.base(x)
        return out if self.merged else out + x @ self.A.T @ self.B.T


def test_parameters_that_eval_merges_are_named_and_kept_to_the_bit():
    torch.manual_seed(0)
    model = Merging()
    before = deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match="depend on A, B in train mode, but not in eval mode"):
        diagonal_fisher(model, [(normal(7, 6).float(),)])
    assert model.training and not model.merged
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class RootOfNegatives(nn.Module):
    """Finite outputs, and a gradient that `where` does not keep from being NaN."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x):
        h = self.first(x)
        return self.head(torch.where(h > 0, h.sqrt(), torch.zeros_like(h)))


@pytest.mark.parametrize("kind", ["predicted", "exact", "class_mean", "class_mean_empirical"])
def test_gradients_of_nan_are_refused(kind):
    with pytest.raises(ValueError, match=r"`first.weight` is not finite"):
        diagonal_fisher(built(RootOfNegatives), [(normal(12, 6), LABELS)], kind)


@pytest.mark.parametrize("kind", ["predicted", "batched"])
def test_nan_is_refused(kind):
    x = normal(7, 6)
    x[3, 2] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        diagonal_fisher(built(mlp), [(x, LABELS[:7])], kind)


def test_batched_overflow_is_refused():
    x = 1e30 * normal(7, 6).float()
    with pytest.raises(ValueError, match=r"overflows torch.float32"):
        diagonal_fisher(built(mlp).float(), [(x, LABELS[:7])], "batched")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_samples": 1.5}, TypeError, "`max_samples` must be a whole number"),
        ({"max_samples": True}, TypeError, "`max_samples` must be a whole number"),
        ({"chunk_size": 0}, ValueError, "`chunk_size` must be >= 1"),
        ({"engine": "foo"}, ValueError, "`engine` must be one of"),
        ({"generator": 5}, TypeError, "`generator` must be a torch.Generator"),
        ({"forward": 3}, TypeError, "`forward` must be a function"),
        ({"progress": "yes"}, TypeError, "`progress` must be True or False"),
    ],
)
def test_options_are_refused_before_anything_is_read(options, error, message):
    with pytest.raises(error, match=message):
        diagonal_fisher(built(mlp), None, **options)


@pytest.mark.parametrize("put", [list, DataLoader, lambda pairs: [dict(x=x) for x, _ in pairs]])
def test_explain_takes_one_batch(put):
    batches = put([(normal(7, 6), torch.zeros(7).long())])
    with pytest.raises(TypeError, match="`batch` must be one batch, such as .* of them"):
        explain(built(mlp), batches)


def test_explain_tells_what_was_checked():
    found = explain(built(mlp), (normal(7, 6),))
    assert "3 different samples have the same logits" in " ".join(found.checks)
    with_apart = explain(built(FixedBatch), (normal(4, 5, 3),))
    assert any("no batch of another size" in check for check in with_apart.checks)


class SubtractsTheMeanOfLargeSamples(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x):
        h = self.first(x).tanh()
        return self.head(h - h.mean(0) if bool((x.abs() > 2.6).any()) else h)


def test_batches_that_interact_after_joined_ones_did_are_refused():
    x, labels = normal(240, 6), torch.arange(240) % 4
    x[:12].clamp_(-2, 2)  # the first batches are harmless
    with pytest.raises(ValueError, match="other logits alone"):
        diagonal_fisher(built(SubtractsTheMeanOfLargeSamples), in_batches(4, x, labels))


class RareDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(6, 64), nn.Linear(64, 4)

    def forward(self, x):
        return self.head(nn.functional.dropout(self.first(x), 0.001, training=True))


def test_noise_that_few_samples_meet_is_refused():
    batches = in_batches(64, normal(128, 6), torch.arange(128) % 4)
    with pytest.raises(ValueError, match="two outputs|other logits alone"):
        diagonal_fisher(built(RareDropout), batches)


@pytest.mark.parametrize("fisher_type", ["predicted", "class_mean", "class_mean_empirical"])
@pytest.mark.parametrize("at", [3, 6])
@pytest.mark.parametrize(
    "draw",
    [lambda: float(torch.rand(())), random.random, np.random.random],
    ids=["torch", "python", "numpy"],
)
def test_noise_of_any_global_generator_in_one_chunk_is_refused(draw, at, fisher_type):
    chunks = count()

    def forward(m, batch):
        chance = draw() < 2 and len(batch[0]) == 20 and next(chunks) == at
        return m(batch[0].flip(1) if chance else batch[0])

    batches = in_batches(20, normal(240, 6), torch.arange(240) % 4)
    with pytest.raises(ValueError, match="two outputs"):
        diagonal_fisher(built(small_mlp), batches, fisher_type, forward=forward, chunk_size=20)


@pytest.mark.parametrize("draw", [random.random, np.random.random])
def test_noise_of_one_sample_alone_is_refused(draw):
    rare, alone = nn.Embedding(240, 4, scale_grad_by_freq=True).double(), count()

    def forward(m, batch):
        chance = draw() < 2 and len(batch[0]) == 1 and next(alone) == 100
        return m(batch[0]) + chance

    batches = [(torch.arange(240), torch.arange(240) % 4)]
    with (
        pytest.warns(UserWarning, match="do not add up"),
        pytest.raises(ValueError, match="other logits alone"),
    ):
        diagonal_fisher(rare, batches, "class_mean_empirical", forward=forward)


class DividingLoader(DataLoader):
    def __iter__(self):
        for x, y in super().__iter__():
            yield x / 255, y


def test_max_samples_keeps_what_a_subclass_of_the_loader_does():
    model, x = built(mlp), normal(12, 6)
    loader = DividingLoader(TensorDataset(255 * x, LABELS), 4)
    got = diagonal_fisher(model, loader, max_samples=8)
    expected = loop_fisher(model, x[:8], LABELS[:8], "predicted")
    assert relative_error(got, expected) < 1e-6


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


class DoublesByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x):
        return Doubled.apply(self.layer(x))


def test_inputs_that_require_a_gradient_are_given_none():
    x = normal(12, 6).requires_grad_()
    diagonal_fisher(built(DoublesByHand), [(x, LABELS)])
    assert x.grad is None


class ClipsItsWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x):
        self.layer.weight.data.clamp_(-0.1, 0.1)
        return self.layer(x)


@pytest.mark.parametrize("fisher_type", ["predicted", "batched"])
def test_weights_that_a_forward_pass_clips_are_put_back(fisher_type):
    words = torch.arange(24).view(12, 2) % 10
    embedding = nn.Sequential(nn.Embedding(10, 4, max_norm=0.5), nn.Flatten(), nn.Linear(8, 4))
    for model, x in ((built(ClipsItsWeight), normal(12, 6)), (embedding.double(), words)):
        before = deepcopy(model.state_dict())
        diagonal_fisher(model, [(x, LABELS)], fisher_type)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class HookedGradient(nn.Module):
    """A hidden layer whose gradient a hook changes."""

    def __init__(self, hook):
        super().__init__()
        self.first, self.head = nn.Linear(3, 4), nn.Linear(4, 3)
        self.hook = hook

    def forward(self, x):
        h = self.first(x).tanh()
        if h.requires_grad:
            h.register_hook(self.hook)
        return self.head(h)


@pytest.mark.parametrize(
    "hook", [lambda g: g / g.norm(dim=1, keepdim=True), lambda g: g.clamp(-1e-2, 1e-2), torch.sign]
)
def test_several_vectors_per_sample_want_a_linear_backward_pass(hook):
    net = HookedGradient(hook).double()
    batches = [(torch.randn(6, 3, dtype=torch.float64), torch.arange(6) % 3)]
    for fisher_type, options in [("exact", {}), ("sampled", {"n_draws": 3})]:
        with pytest.raises(ValueError, match="not linear"):
            diagonal_fisher(net, batches, fisher_type, **options)
    found = diagonal_fisher(net, batches, "empirical")
    expected = loop_fisher(net, *batches[0], "empirical")
    assert relative_error(found, expected) < 1e-12


def test_a_linear_hook_is_no_obstacle_to_several_vectors():
    net = HookedGradient(lambda g: g * torch.tensor([1.0, 0.0, 2.0, 1.0], dtype=g.dtype)).double()
    batches = [(torch.randn(6, 3, dtype=torch.float64), torch.arange(6) % 3)]
    expected = loop_fisher(net, *batches[0], "exact")
    assert relative_error(diagonal_fisher(net, batches, "exact"), expected) < 1e-12


class ScaledByOutliers(nn.Module):
    """Samples that interact where one of them is an outlier."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(x) * x.max().clamp(min=5.0)


def test_an_audit_that_fails_too_late_is_an_error(monkeypatch):
    monkeypatch.setattr(accumulate, "_RECENT_ENTRIES", 1)
    watch = accumulate.Auditor.watch
    monkeypatch.setattr(
        accumulate.Auditor, "watch", lambda self, N, must: watch(self, N, must=True)
    )
    x = normal(20, 6).clamp(-3, 3)
    x[16:, 0] = torch.tensor([9.0, 8.0, 7.0, 6.0])
    with pytest.raises(
        ValueError, match="An audit found, after 16 samples, .*interact.*chunk_size=1"
    ):
        diagonal_fisher(built(ScaledByOutliers), in_batches(1, x), chunk_size=4)


@pytest.mark.parametrize(
    ("batch", "what"),
    [
        ({"pixels": normal(4, 6)}, r"a mapping with \['pixels'\]"),
        ((["a", "b", "c", "d"], LABELS[:4]), "a tuple of list, Tensor"),
    ],
)
def test_inputs_that_the_model_does_not_take_are_named(batch, what):
    with pytest.raises(TypeError, match=f"`model` does not take the inputs of {what}.*`forward`"):
        diagonal_fisher(built(lambda: nn.Linear(6, 4)), [batch])


@pytest.mark.parametrize(
    ("batches", "got"),
    [
        ([(np.zeros((3, 6)), np.zeros(3))], "got ndarray"),
        ({"pixels": normal(3, 6)}, "got str"),
        ([argparse.Namespace(x=normal(3, 6))], "got Namespace"),
        ([()], "got nothing"),
    ],
)
def test_batches_without_a_tensor_are_named(batches, got):
    with pytest.raises(ValueError, match=f"`batches` must yield tuples.*{got}"):
        diagonal_fisher(built(mlp), batches)


@pytest.mark.parametrize("found", [None, [normal(3, 4)]])
def test_a_score_that_returns_no_vectors_is_refused(found):
    with pytest.raises(ValueError, match=f"must return a tensor.*, got {type(found).__name__}"):
        diagonal_fisher(built(mlp), [(normal(3, 6),)], lambda outputs, batch: found)


class SlightlyInteracting(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(x) * (1 + 1e-3 * x.mean())


def test_a_slight_interaction_is_refused_in_float32():
    model = built(SlightlyInteracting).float()
    with pytest.raises(ValueError, match="samples interact"):
        diagonal_fisher(model, in_batches(4, normal(12, 6).float() + 1))


class Masks(nn.Module):
    """Interacts, or draws, before the last classes are masked or all get an offset."""

    def __init__(self, *, noisy, mask=None, offset=0.0):
        super().__init__()
        self.body, self.head = nn.TransformerEncoderLayer(6, 2, 8), nn.Linear(6, 6)
        self.noisy, self.mask, self.offset = noisy, mask, offset

    def forward(self, x):
        h = nn.functional.dropout(x[:, 0], 0.2) if self.noisy else self.body(x).mean(1)
        z = self.head(h) + self.offset
        return z if self.mask is None else z.masked_fill(torch.arange(6) >= 3, self.mask)


FINFO = torch.finfo(torch.float32)


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize(
    "options",
    [{"mask": -torch.inf}, {"mask": -1e9}, {"mask": -1e4}, {"mask": FINFO.min}, {"offset": 1e4}],
    ids=str,
)
def test_large_logits_hide_no_interaction_and_no_noise(noisy, options):
    torch.manual_seed(0)
    model = Masks(noisy=noisy, **options).eval()
    with pytest.raises(ValueError, match="interact"):
        diagonal_fisher(model, [(normal(64, 5, 6).float(),)])


class BesideTimeStamps(nn.Module):
    """Two packed sequences and an unscaled column, whose gradient is far larger than any other."""

    def __init__(self):
        super().__init__()
        self.gru, self.head = nn.GRU(6, 8, batch_first=True), nn.Linear(8, 4)
        self.time = nn.Linear(1, 4, bias=False)

    def forward(self, x, time):
        h = self.gru(x)[1][-1]
        return self.head(h) + 1e-9 * self.time(time)


def test_one_huge_gradient_hides_no_wrong_rule(monkeypatch):
    torch.manual_seed(0)
    model, x = BesideTimeStamps(), normal(24, 5, 6).float()
    time = 1.7e18 * (1 + 0.1 * normal(24, 1).float().abs())
    monkeypatch.setattr(
        RULES[nn.functional.linear], "prepare", lambda call, a: a.flip(0) if len(a) > 1 else a * 2
    )

    def forward(m, batch):
        return m(*batch)

    served = explain(model, (x, time), forward=forward)
    assert served["gru.weight_ih_l0"].engine != "rules"
    assert "differ" in served["gru.weight_ih_l0"].detail or "disagrees" in str(served)


def clipped(p):
    p.register_hook(lambda g: g.clamp(-3, 3))


def frozen_row(p):
    mask = torch.ones_like(p)
    mask[-1] = 0
    p.register_hook(lambda g: g * mask)


@pytest.mark.parametrize("hook", [clipped, frozen_row])
@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_hooks_on_parameters_change_the_gradients_that_are_squared(hook, engine):
    model, x = built(small_mlp), normal(60, 6)
    for p in model.parameters():
        hook(p)
    x[40:] *= 30  # the first samples are not clipped
    got = diagonal_fisher(model, [(x,)], engine=engine)
    assert relative_error(got, loop_fisher(model, x, None, "predicted")) < 1e-12
    with pytest.raises(ValueError, match="a hook changes its gradient"):
        diagonal_fisher(model, [(x,)], engine="rules")


class ClippedExpansion(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.ones(6)), nn.Linear(6, 4)

    def forward(self, x):
        scale = self.scale.expand(len(x), 6)
        if scale.requires_grad:
            scale.register_hook(lambda g: g.clamp(-0.05, 0.05))
        return self.head(x * scale)


def test_hooks_on_what_comes_from_a_parameter_change_its_gradient():
    model, x = built(ClippedExpansion), 0.01 * normal(24, 6)
    x[8:] *= 300
    got = diagonal_fisher(model, [(x,)], chunk_size=8)
    assert relative_error(got, loop_fisher(model, x, None, "predicted")) < 1e-12


def small_mlp():
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize("script", [torch.jit.script, lambda m: torch.jit.trace(m, normal(2, 6))])
def test_a_torchscript_model_has_the_fisher_of_its_source(script):
    model = built(small_mlp)
    x = normal(12, 6)
    got = diagonal_fisher(script(deepcopy(model)), in_batches(4, x, LABELS))
    assert relative_error(got, loop_fisher(model, x, LABELS, "predicted")) < 1e-12


class HasALayerOfWidthZero(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.empty = nn.Linear(6, 4), nn.Linear(0, 4)

    def forward(self, x):
        return self.first(x) + self.empty(x[:, :0])


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(
    "make", [HasALayerOfWidthZero, lambda: nn.Sequential(nn.Linear(6, 0), nn.Linear(0, 4))]
)
@pytest.mark.parametrize("kind", ["predicted", "exact"])
def test_a_layer_of_width_zero_is_no_special_case(make, kind):
    model, x = built(make), normal(12, 6)
    got = diagonal_fisher(model, in_batches(4, x, LABELS), kind)
    expected = diagonal_fisher(model, in_batches(4, x, LABELS), kind, engine="loop")
    for name, total in expected.items():
        torch.testing.assert_close(got[name], total, rtol=1e-12, atol=0)


@pytest.mark.parametrize("score", [gaussian_score, bernoulli_score])
@pytest.mark.parametrize(
    "shape", [nn.Flatten(0), nn.Identity(), nn.Unflatten(1, (1, 1))], ids=["[N]", "[N, 1]", "image"]
)
def test_scores_of_other_likelihoods_take_outputs_of_any_shape(score, shape):
    model, x = built(lambda: nn.Sequential(nn.Linear(6, 1), shape)), normal(12, 6)
    got = diagonal_fisher(model, in_batches(4, x, LABELS), score)
    assert relative_error(got, diagonal_fisher(model[:1], in_batches(4, x, LABELS), score)) < 1e-12


@pytest.mark.parametrize("kind", ["empirical", "reversed", "class_mean_empirical"])
def test_a_label_of_a_masked_class_is_refused(kind):
    model, x = (
        built(small_mlp),
        normal(12, 6),
    )
    mask = torch.tensor([0.0, 0.0, 0.0, -torch.inf])
    with pytest.raises(ValueError, match="label whose logit is -inf"):
        diagonal_fisher(
            model, in_batches(4, x, LABELS), kind, forward=lambda m, batch: m(batch[0]) + mask
        )


@pytest.mark.parametrize("kind", ["empirical", "class_mean_empirical"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
def test_labels_of_few_bits(kind, dtype):
    """The default `ignore_index`, -100, is 156 in uint8."""
    model, x = built(lambda: nn.Linear(6, 200)), normal(12, 6)
    y = torch.tensor([156, 3, 156, 199] if dtype is torch.uint8 else [56, 3, 127, 0]).repeat(3)
    want = diagonal_fisher(model, [(x, y)], kind)
    found = diagonal_fisher(model, [(x, y.to(dtype))], kind)
    assert found.n_samples == 12
    assert relative_error(found, want) < 1e-12
    dense = diagonal_fisher(
        model, [(x, y[:, None].to(dtype))], forward=lambda m, b: m(b[0])[:, None], class_dim=2
    )
    assert dense.n_samples == 12


def test_arguments_that_cannot_be_used_are_named():
    model, x = (
        built(small_mlp),
        normal(12, 6),
    )
    with pytest.raises(ValueError, match="`class_dim` is 5"):
        diagonal_fisher(model, in_batches(4, x, LABELS), class_dim=5)
    with pytest.raises(TypeError, match="`batches` must be iterable, got NoneType"):
        diagonal_fisher(model, None)
    with pytest.raises(TypeError, match="looks like one batch"):
        diagonal_fisher(model, (x, LABELS))
    with pytest.raises(TypeError, match="is a dataset, TensorDataset"):
        diagonal_fisher(model, TensorDataset(x, LABELS))
    with pytest.raises(ValueError, match="not initialised .0.weight, 0.bias"):
        diagonal_fisher(nn.Sequential(nn.LazyLinear(4)), in_batches(4, x, LABELS))


def test_hooks_on_parameters_are_left_as_found():
    net = nn.Linear(3, 2)
    batch = (torch.randn(4, 3), torch.zeros(4, dtype=torch.long))
    handle = net.weight.register_hook(lambda g: g * 3)
    hooks = dict(net.weight._backward_hooks)
    F = diagonal_fisher(net, [batch])
    assert dict(net.weight._backward_hooks) == hooks and net.bias._backward_hooks is None
    handle.remove()
    assert list(F) == [name for name, _ in net.named_parameters()]
