"""Split MNIST in the three scenarios: EWC and online EWC beside no protection.

The published lambda are chosen by a grid search; they are twice ours, since the source writes
lambda / 2. Its Fisher is per sample, of labels that the model predicts. Its pixels are in [0, 1]:
the authors' code has `ToTensor` and nothing else. Three arms have them as Avalanche normalises
them, since a lambda serves one of the two alone.
"""

from experiments.studies.reproduce.protocol import Arm, Protocol, Reference

WHERE = "van de Ven and Tolias 2019, arXiv 1904.07734, split MNIST, quoted at second hand"
EWC = {"method": "ewc", "fisher_type": "predicted"}
LAMBDA = {"task": 5e6, "domain": 5e5, "class": 5e7}
REFERENCE = {"task": (0.9864, 0.01), "domain": (0.6395, 0.05), "class": (0.2001, 0.01)}


def _arms(scenario: str) -> tuple[Arm, ...]:
    value, margin = REFERENCE[scenario]
    naive = f"Naive, {scenario}"
    ewc = {**EWC, "scenario": scenario, "ewc_lambda": LAMBDA[scenario]}
    online = {"mode": "online", "decay_factor": 1.0}
    return (
        Arm(naive, {"method": "naive", "scenario": scenario}),
        Arm(
            f"EWC, {scenario}",
            {**ewc, "mode": "separate"},
            Reference(value, margin, WHERE),
            against=naive,
        ),
        Arm(f"online EWC, {scenario}", {**ewc, **online}, against=naive),
    )


NORMALIZED = tuple(
    Arm(
        f"EWC, {scenario}, pixels normalised",
        {**EWC, "mode": "separate", "scenario": scenario, "ewc_lambda": value, "pixels": None},
        seeds=(0, 1, 2),
    )
    for scenario, value in LAMBDA.items()
)

PROTOCOL = Protocol(
    name="vandeven2022",
    source="van de Ven, Tuytelaars and Tolias 2022, Three types of incremental learning; numbers "
    "from its preprint, van de Ven and Tolias 2019, arXiv 1904.07734",
    setting={
        "benchmark": "split",
        "n_experiences": 5,
        "iterations": 2000,
        "batch_size": 128,
        "hidden_size": 400,
        "hidden_layers": 2,
        "optimizer": "adam",
        "learning_rate": 1e-3,
        "pixels": "unit",
    },
    arms=(*_arms("task"), *_arms("domain"), *_arms("class"), *NORMALIZED),
    seeds=tuple(range(10)),
    search=tuple(
        {**EWC, "mode": "separate", "scenario": "domain", "ewc_lambda": ewc_lambda}
        for ewc_lambda in (1e2, 1e3, 1e4, 1e5, 5e5, 5e6, 5e7)
    ),
    digits={"iterations": 60, "hidden_size": 24, "batch_size": 32},
)
