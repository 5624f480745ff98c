"""Class means, reversed logits and language models through Avalanche's training loop."""

import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets
from avalanche.benchmarks.utils import AvalancheDataset
from avalanche.training.supervised import Naive
from torch import nn

from ewc_plugin import DiagonalEWCPlugin, causal_lm, diagonal_fisher
from support.gradients import between_classes, sample_gradients
from support.plugin_streams import benchmark, mlp, multi_head, strategy, train
from support.reference import relative_error


@pytest.mark.parametrize(
    "kind", ["class_mean", "class_mean_reversed", "reversed", "batched_reversed"]
)
@pytest.mark.parametrize("heads", [False, True])
def test_the_stream_is_trained_and_every_experience_has_an_importance(kind, heads):
    plugin = DiagonalEWCPlugin(1.0, fisher_type=kind)
    model = multi_head() if heads else mlp()
    train(strategy(model, plugin), benchmark(task_labels=heads).train_stream)
    assert plugin.penalty.n_experiences == 2
    assert float(plugin.penalty_loss) > 0


def test_the_class_mean_of_an_experience():
    plugin = DiagonalEWCPlugin(1.0, fisher_type="class_mean_empirical")
    model = mlp()
    train(strategy(model, plugin), benchmark().train_stream[:1])
    model = model.eval().double()
    data = benchmark().train_stream[0].dataset.eval()
    x = torch.stack([data[i][0] for i in range(len(data))]).double()
    y = torch.tensor([int(data[i][1]) for i in range(len(data))])

    def log_p(n):
        return model(x[n : n + 1]).log_softmax(1)[0, y[n]]

    want = between_classes(sample_gradients(model, log_p, len(y)), y)
    assert relative_error(plugin.fisher, want) < 1e-4


class NextToken(Naive):
    """Batches are dictionaries; the loss is the next tokens' cross entropy."""

    @property
    def mb_x(self):
        return self.mbatch["input_ids"]

    @property
    def mb_y(self):
        return self.mbatch["input_ids"]

    def _unpack_minibatch(self):
        self.mbatch = {k: v.to(self.device) for k, v in self.mbatch.items()}

    def forward(self):
        return self.model(**self.mbatch).logits

    def criterion(self):
        logits = self.mb_output[:, :-1].flatten(0, 1)
        return nn.functional.cross_entropy(logits, self.mb_y[:, 1:].flatten())


@pytest.mark.filterwarnings("ignore")  # of transformers
def test_a_causal_language_model():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=17, n_embd=8, n_layer=1, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    ids = torch.randint(1, 17, (2, 6, 5))
    stream = benchmark_from_datasets(
        train=[AvalancheDataset([[{"input_ids": row} for row in task]]) for task in ids]
    ).train_stream
    plugin = DiagonalEWCPlugin(1.0, fisher_options=causal_lm())
    learner = strategy(model, plugin, kind=NextToken, train_mb_size=4)
    train(learner, stream)
    want = diagonal_fisher(model.eval(), [{"input_ids": ids[1]}], **causal_lm())
    assert relative_error(plugin.fisher, {n: f.double() for n, f in want.items()}) < 1e-5
    assert float(plugin.penalty_loss) > 0
