"""Language models of `transformers`, random weights, against a loop over single sequences."""

import pytest
import torch

from ewc_plugin import causal_lm, diagonal_fisher, masked_lm
from support.gradients import mean_square, sample_gradients
from support.reference import relative_error

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs

SIZES = {"vocab_size": 17, "attn_implementation": "eager"}


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=8, n_layer=1, n_head=2, n_positions=12, bos_token_id=0, eos_token_id=0, **SIZES
    )
    return transformers.GPT2LMHeadModel(config).double().eval()


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=12,
        **SIZES,
    )
    return transformers.BertForMaskedLM(config).double().eval()


def tokens(N=5, T=6, padded=True):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 17, (N, T), generator=generator)
    lengths = torch.tensor([6, 3, 5, 2, 6])[:N] if padded else torch.full((N,), T)
    return ids, (torch.arange(T) < lengths[:, None]).long(), lengths


def loader(batch, size):
    N = len(batch["input_ids"])
    return [{k: v[i : i + size] for k, v in batch.items()} for i in range(0, N, size)]


def causal_expected(model, ids, lengths, kind):
    """Each sequence alone and without padding."""

    def log_p(n):
        one = ids[n : n + 1, : lengths[n]]
        log_p = model(input_ids=one).logits[0, :-1].log_softmax(-1)
        labels = one[0, 1:] if kind == "empirical" else log_p.argmax(-1)
        return log_p.gather(1, labels[:, None]).sum()

    return mean_square(sample_gradients(model, log_p, len(ids)))


@pytest.mark.parametrize("kind", ["predicted", "empirical"])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_causal(kind, size):
    model, (ids, mask, lengths) = gpt2(), tokens()
    want = causal_expected(model, ids, lengths, kind)
    batches = loader({"input_ids": ids, "attention_mask": mask, "labels": ids}, size)
    assert relative_error(diagonal_fisher(model, batches, kind, **causal_lm()), want) < 1e-11
    unlabelled = loader({"input_ids": ids, "attention_mask": mask}, size)
    assert relative_error(diagonal_fisher(model, unlabelled, kind, **causal_lm()), want) < 1e-11


def test_causal_in_float32():
    model, (ids, mask, lengths) = gpt2(), tokens()
    want = causal_expected(model, ids, lengths, "predicted")
    batches = loader({"input_ids": ids, "attention_mask": mask}, 5)
    found = diagonal_fisher(model.float(), batches, **causal_lm())
    assert relative_error(found, want) < 1e-4


def test_labels_that_are_ignored():
    model, (ids, mask, _) = gpt2(), tokens(padded=False)
    labels = ids.clone()
    labels[:, :3] = -100  # a prompt

    def log_p(n):
        log_p = model(input_ids=ids[n : n + 1]).logits[0, 2:-1].log_softmax(-1)
        return log_p.gather(1, ids[n, 3:, None]).sum()

    want = mean_square(sample_gradients(model, log_p, len(ids)))
    batches = loader({"input_ids": ids, "attention_mask": mask, "labels": labels}, 2)
    found = diagonal_fisher(model, batches, "empirical", **causal_lm())
    assert relative_error(found, want) < 1e-11


def test_without_the_helper_outputs_are_taken_as_they_come():
    model, (ids, mask, lengths) = gpt2(), tokens()

    def log_p(n):
        one = ids[n : n + 1, : lengths[n]]
        return model(input_ids=one).logits[0].log_softmax(-1).max(-1).values.sum()

    want = mean_square(sample_gradients(model, log_p, len(ids)))
    batches = loader({"input_ids": ids, "attention_mask": mask, "labels": ids}, 2)
    assert relative_error(diagonal_fisher(model, batches), want) < 1e-11
    with pytest.raises(ValueError, match=r"not shifted.*causal_lm\(\)"):
        diagonal_fisher(model, batches, "empirical")


@pytest.mark.parametrize("kind", ["predicted", "empirical"])
def test_masked(kind):
    model, (ids, mask, lengths) = bert(), tokens()
    labels = torch.where(torch.arange(6) % 2 == 0, ids, -100)
    labels = torch.where(mask == 1, labels, -100)

    def log_p(n):
        one = slice(0, lengths[n])
        log_p = model(input_ids=ids[n : n + 1, one]).logits[0].log_softmax(-1)
        counted = labels[n, one] != -100
        chosen = labels[n, one].clamp(min=0) if kind == "empirical" else log_p.argmax(-1)
        return (log_p.gather(1, chosen[:, None])[:, 0] * counted).sum()

    want = mean_square(sample_gradients(model, log_p, len(ids)))
    batches = loader({"input_ids": ids, "attention_mask": mask, "labels": labels}, 2)
    for options in (masked_lm(), {}):
        assert relative_error(diagonal_fisher(model, batches, kind, **options), want) < 1e-11


def test_other_batches_are_refused():
    with pytest.raises(ValueError, match="mappings with 'input_ids'"):
        diagonal_fisher(gpt2(), [(torch.zeros(2, 3).long(),)], **causal_lm())
    with pytest.raises(ValueError, match="`masked_lm` needs batches with 'labels'"):
        diagonal_fisher(bert(), [{"input_ids": torch.zeros(2, 3).long()}], **masked_lm())
