# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # From `pip install` to the λ curve
#
# In under five minutes on a laptop, on the digits that come with scikit-learn. Run it from the
# `docs` folder of a clone.

# %% tags=["skip-execution"]
# %pip install --quiet -e "..[experiments]"

# %% [markdown]
# ## Three tasks
#
# The pixels of the digits are permuted anew in each task, and one network learns them one after the
# other. λ is to be chosen, so accuracy is measured on images that are held out of the training
# images; the test images are kept for the last cell.

# %%
import warnings

# Of a progress bar that is not shown, and of evaluators whose results are read directly.
warnings.filterwarnings("ignore", message="IProgress not found|No loggers specified")

# %%
import matplotlib.pyplot as plt
import pandas as pd
import torch
from avalanche.benchmarks import tensors_benchmark
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.models import SimpleMLP
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import Naive
from sklearn.datasets import load_digits

from ewc_plugin import DiagonalEWCPlugin

digits = load_digits()
x, y = torch.tensor(digits.data / 16).float(), torch.tensor(digits.target)
TRAIN, VALIDATION, TEST = slice(0, 1200), slice(1200, 1437), slice(1437, None)


def make_benchmark(seed, held_out):
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(64, generator=generator) for _ in range(3)]
    return tensors_benchmark(
        train_tensors=[(x[TRAIN][:, order], y[TRAIN]) for order in orders],
        test_tensors=[(x[held_out][:, order], y[held_out]) for order in orders],
        task_labels=[0, 0, 0],
    )


# %% [markdown]
# ## One run
#
# Any Avalanche strategy with a `DiagonalEWCPlugin`. It gives a row of accuracies after every task.


# %%
def run(seed, ewc_lambda, held_out=VALIDATION):
    """A row per task trained through and task tested on."""
    benchmark = make_benchmark(seed, held_out)
    torch.manual_seed(seed)
    model = SimpleMLP(num_classes=10, input_size=64, hidden_size=100, drop_rate=0)
    strategy = Naive(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=3e-3),
        criterion=torch.nn.CrossEntropyLoss(),
        train_mb_size=64,
        train_epochs=5,
        eval_mb_size=512,
        plugins=[DiagonalEWCPlugin(ewc_lambda, normalize="mean")],
        evaluator=EvaluationPlugin(accuracy_metrics(experience=True), loggers=[]),
    )
    rows = []
    for trained, experience in enumerate(benchmark.train_stream):
        strategy.train(experience)
        accuracies = strategy.eval(benchmark.test_stream).values()
        rows += [
            {"seed": seed, "lambda": ewc_lambda, "trained": trained, "tested": j, "accuracy": a}
            for j, a in enumerate(accuracies)
        ]
    return rows


naive = pd.DataFrame(run(seed=0, ewc_lambda=0))  # bit for bit the run without the plugin
naive.pivot(index="trained", columns="tested", values="accuracy").round(3)

# %% [markdown]
# Down the first column the first task is forgotten. With EWC it is forgotten less:

# %%
ewc = pd.DataFrame(run(seed=0, ewc_lambda=0.1))
ewc.pivot(index="trained", columns="tested", values="accuracy").round(3)

# %% [markdown]
# ## The λ curve
#
# Five λ and plain training, three seeds each. Too small a λ forgets the old tasks, too large a one
# does not learn the new ones.

# %%
LAMBDAS = [0, 1e-3, 1e-2, 1e-1, 1, 10]
rows = [row for seed in (0, 1, 2) for ewc_lambda in LAMBDAS for row in run(seed, ewc_lambda)]
table = pd.DataFrame(rows)
last = table[table["trained"] == 2]
curve = last.groupby(["lambda", "seed"])["accuracy"].mean().unstack()
curve.assign(mean=curve.mean(axis=1)).round(3)

# %%
learned = table[table["trained"] == table["tested"]].groupby(["lambda", "seed"])["accuracy"].mean()
figure, axis = plt.subplots(figsize=(6, 3.6), dpi=80, layout="constrained")
for name, values in {
    "after the last task": curve,
    "right after learning": learned.unstack(),
}.items():
    with_ewc = values.drop(index=0)
    (line,) = axis.plot(with_ewc.index, with_ewc.mean(axis=1), marker="o", label=f"EWC, {name}")
    axis.fill_between(
        with_ewc.index,
        with_ewc.min(axis=1),
        with_ewc.max(axis=1),
        color=line.get_color(),
        alpha=0.2,
    )
axis.axhline(
    curve.loc[0].mean(), color="0.4", linestyle="--", label="no penalty, after the last task"
)
axis.set(xscale="log", xlabel="λ, with F divided by its mean", ylabel="validation accuracy")
axis.legend(fontsize=8)
axis.grid(alpha=0.3)

# %% [markdown]
# ## What it comes to on test images
#
# The λ that was best on validation images, with seeds that had no part in choosing it.

# %%
best = curve.mean(axis=1).idxmax()
test_rows = [row for seed in (10, 11, 12) for value in (0, best) for row in run(seed, value, TEST)]
test = pd.DataFrame(test_rows)
test = test[test["trained"] == 2].groupby(["lambda", "seed"])["accuracy"].mean().unstack()
test.assign(mean=test.mean(axis=1)).round(3)

# %% [markdown]
# `python -m experiments` does the same on MNIST, in parallel, with checked tables and intervals;
# `python -m experiments tune` is its λ grid.
