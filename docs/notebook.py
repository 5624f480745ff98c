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
COLUMNS = ["seed", "lambda", "trained", "tested", "accuracy"]


def run(seed, ewc_lambda, held_out=VALIDATION):
    """A row per task trained through and task tested on."""
    benchmark = make_benchmark(seed, held_out)
    torch.manual_seed(seed)
    model = SimpleMLP(10, input_size=64, hidden_size=100, drop_rate=0)
    evaluator = EvaluationPlugin(accuracy_metrics(experience=True), loggers=[])
    strategy = Naive(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=3e-3),
        criterion=torch.nn.CrossEntropyLoss(),
        train_mb_size=64,
        train_epochs=5,
        eval_mb_size=512,
        plugins=[DiagonalEWCPlugin(ewc_lambda, normalize="mean")],
        evaluator=evaluator,
    )
    rows = []
    for trained, experience in enumerate(benchmark.train_stream):
        strategy.train(experience)
        accuracies = strategy.eval(benchmark.test_stream).values()
        for tested, accuracy in enumerate(accuracies):
            rows.append([seed, ewc_lambda, trained, tested, accuracy])
    return rows


# With a λ of zero it is bit for bit the run without the plugin.
naive = pd.DataFrame(run(seed=0, ewc_lambda=0), columns=COLUMNS)
naive.pivot(index="trained", columns="tested", values="accuracy").round(3)

# %% [markdown]
# Down the first column the first task is forgotten. With EWC it is forgotten less:

# %%
ewc = pd.DataFrame(run(seed=0, ewc_lambda=0.1), columns=COLUMNS)
ewc.pivot(index="trained", columns="tested", values="accuracy").round(3)

# %% [markdown]
# ## The λ curve
#
# Five λ and plain training, three seeds each. Too small a λ forgets the old tasks, too large a one
# does not learn the new ones.

# %%
LAMBDAS = [0, 1e-3, 1e-2, 1e-1, 1, 10]
rows = []
for seed in (0, 1, 2):
    for ewc_lambda in LAMBDAS:
        rows += run(seed, ewc_lambda)
table = pd.DataFrame(rows, columns=COLUMNS)


def by_lambda(rows):
    """Mean accuracy over the tasks, a row per λ, a column per seed."""
    return rows.groupby(["lambda", "seed"])["accuracy"].mean().unstack()


curve = by_lambda(table[table["trained"] == 2])
curve.assign(mean=curve.mean(axis=1)).round(3)

# %%
learned = by_lambda(table[table["trained"] == table["tested"]])
curves = {"after the last task": curve, "right after learning": learned}
figure, axis = plt.subplots(figsize=(6, 3.6), dpi=80, layout="constrained")
for (name, values), colour in zip(curves.items(), ("C0", "C1"), strict=True):
    ewc = values.drop(index=0)
    low, mean, high = ewc.min(axis=1), ewc.mean(axis=1), ewc.max(axis=1)
    axis.plot(mean, marker="o", color=colour, label=f"EWC, {name}")
    axis.fill_between(mean.index, low, high, color=colour, alpha=0.2)
axis.axhline(curve.loc[0].mean(), color="0.4", linestyle="--", label="no penalty")
axis.set(xscale="log", xlabel="λ, with F divided by its mean")
axis.set_ylabel("validation accuracy; band: range")
axis.legend(fontsize=8)
axis.grid(alpha=0.3)

# %% [markdown]
# ## What it comes to on test images
#
# The λ that was best on validation images, with seeds that had no part in choosing it.

# %%
best = curve.mean(axis=1).idxmax()
rows = []
for seed in (10, 11, 12):
    for ewc_lambda in (0, best):
        rows += run(seed, ewc_lambda, TEST)
table = pd.DataFrame(rows, columns=COLUMNS)
test = by_lambda(table[table["trained"] == 2])
test.assign(mean=test.mean(axis=1)).round(3)

# %% [markdown]
# `python -m experiments` does the same on MNIST, in parallel, with checked tables and intervals;
# `python -m experiments tune` chooses λ.
