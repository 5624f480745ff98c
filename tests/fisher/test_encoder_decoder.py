"""Whose mask the positions are: encoder-decoder models of `transformers`, and other masks."""

import pytest
import torch
from torch import nn

from ewc_plugin import causal_lm, diagonal_fisher
from support.gradients import mean_square, sample_gradients
from support.reference import relative_error

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs

V = 17


def t5():
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2}
    tokens = {"vocab_size": V, "decoder_start_token_id": 0, "pad_token_id": 0}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, **tokens))


def bart():
    sizes = {"d_model": 8, "max_position_embeddings": 16, "vocab_size": V}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 1, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 12}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes, **tokens))


def built(make):
    torch.manual_seed(0)
    return make().double().eval()


def batch_of(model, T, given="labels"):
    """Sources of up to 6 tokens, targets of up to T: padded to other lengths than the sources."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(6) < torch.tensor([6, 3, 5, 2, 6])[:, None]
    labels = torch.randint(3, V, (5, T), generator=generator)
    counted = torch.arange(T) < torch.tensor([T, 4, 2, T, 3])[:, None]
    labels[~counted] = -100
    ids = torch.randint(3, V, (5, 6), generator=generator) * mask
    batch = {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}
    if given != "labels":
        batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
    if given == "mask":
        batch["decoder_attention_mask"] = counted.long()
    return batch, counted


def expected(model, batch, counted, kind):
    def log_p(n):
        one = {name: part[n : n + 1] for name, part in batch.items()}
        log_p = model(**one).logits[0].log_softmax(-1)
        y = one["labels"][0].clamp(min=0) if kind == "empirical" else log_p.argmax(-1)
        return (log_p.gather(1, y[:, None])[:, 0] * counted[n]).sum()

    return mean_square(sample_gradients(model, log_p, len(counted)))


@pytest.mark.parametrize("kind", ["predicted", "empirical"])
@pytest.mark.parametrize("given", ["labels", "ids", "mask"])
@pytest.mark.parametrize("T", [4, 6])
@pytest.mark.parametrize("make", [t5, bart])
def test_positions_are_the_decoders(make, T, given, kind):
    model = built(make)
    batch, counted = batch_of(model, T, given)
    want = expected(model, batch, counted, kind)
    parts = [{name: part[i : i + 2] for name, part in batch.items()} for i in (0, 2, 4)]
    assert relative_error(diagonal_fisher(model, parts, kind), want) < 1e-11
    inside = nn.ModuleDict({"inner": model})
    found = diagonal_fisher(
        inside, parts, kind, forward=lambda net, batch: net["inner"](**batch).logits
    )
    assert relative_error({n.removeprefix("inner."): f for n, f in found.items()}, want) < 1e-11


def test_without_labels_the_decoders_mask_counts():
    model = built(t5)
    batch, counted = batch_of(model, 6, "mask")
    want = expected(model, batch, counted, "predicted")
    del batch["labels"]
    assert relative_error(diagonal_fisher(model, [batch], class_dim=-1), want) < 1e-11


def test_what_a_decoder_reads_must_be_known():
    model = built(bart)
    batch, _ = batch_of(model, 6)
    del batch["labels"]  # this model shifts the encoder's tokens then
    with pytest.raises(ValueError, match="`positions` is needed: `model` has an encoder and a"):
        diagonal_fisher(model, [batch], class_dim=-1)
    every = torch.ones(5, 6)
    want = expected(model, batch, every, "predicted")
    found = diagonal_fisher(model, [batch], class_dim=-1, positions=lambda batch: None)
    assert relative_error(found, want) < 1e-11


def test_the_causal_helper_is_not_for_a_decoder_that_reads_shifted_labels():
    model = built(t5)
    with pytest.raises(ValueError, match="`causal_lm` is for models without an encoder: T5"):
        diagonal_fisher(model, [batch_of(model, 6)[0]], **causal_lm())


class Tagger(nn.Module):
    """Logits [N, k + T, V] of token ids [N, T], k positions of the model's own before them."""

    def __init__(self, k=0):
        super().__init__()
        own = torch.randn(k, 5, dtype=torch.float64)
        self.own = nn.Parameter(own) if k else own
        self.embedding, self.head = nn.Embedding(11, 5), nn.Linear(5, 4)

    def forward(self, input_ids, attention_mask=None):
        own = self.own.expand(len(input_ids), -1, -1)
        return self.head(torch.cat([own, self.embedding(input_ids)], 1).cumsum(1).tanh())


ids = torch.arange(12).view(2, 6) % 11
tokens = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
additive = torch.zeros(2, 6).masked_fill(tokens == 0, -torch.inf)
packed = torch.tensor([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 2]])


@pytest.mark.parametrize("mask", [additive, additive.nan_to_num(), packed])
@pytest.mark.parametrize("options", [{"class_dim": -1}, causal_lm()])
def test_a_mask_that_does_not_say_what_counts_is_refused(mask, options):
    model = built(Tagger)
    if options.get("forward"):
        options = {**options, "forward": lambda model, batch: model(batch["input_ids"])[:, :-1]}
    batch = {"input_ids": ids, "attention_mask": mask}
    with pytest.raises(ValueError, match="'attention_mask' must be 0 at padding and 1 elsewhere"):
        diagonal_fisher(model, [batch], **options)
    cut = slice(0, -1) if options.get("forward") else slice(None)
    options = {
        **options,
        "positions": lambda batch: (batch["attention_mask"] == mask[0, 0])[:, cut],
    }
    assert diagonal_fisher(model, [batch], **options).n_samples >= 1


@pytest.mark.parametrize("mask", [tokens, tokens.bool(), tokens.double()])
def test_any_type_of_a_mask_of_zeros_and_ones(mask):
    model = built(Tagger)
    want = diagonal_fisher(
        model, [{"input_ids": ids[:1, :4]}, {"input_ids": ids[1:]}], class_dim=-1
    )
    found = diagonal_fisher(model, [{"input_ids": ids, "attention_mask": mask}], class_dim=-1)
    assert relative_error(found, want) < 1e-12


def test_a_mask_of_another_shape():
    batch = {"input_ids": ids, "attention_mask": tokens[:, None, None]}
    with pytest.raises(ValueError, match="`positions` must have the shape"):
        diagonal_fisher(built(Tagger), [batch], class_dim=-1)


def test_positions_of_the_models_own_are_cut_off():
    model = built(lambda: Tagger(k=3))
    batch = {"input_ids": ids, "attention_mask": tokens}
    with pytest.raises(ValueError, match=r"before the inputs, cut them off in `forward`"):
        diagonal_fisher(model, [batch], class_dim=-1)

    def log_p(n):
        z = model(ids[n : n + 1])[0, 3:].log_softmax(-1).amax(-1)
        return (z * tokens[n]).sum()

    found = diagonal_fisher(
        model, [batch], class_dim=-1, forward=lambda net, batch: net(batch["input_ids"])[:, 3:]
    )
    assert relative_error(found, mean_square(sample_gradients(model, log_p, 2))) < 1e-12
