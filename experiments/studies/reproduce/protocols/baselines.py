"""Protocol of Avalanche's continual-learning-baselines: EWC on permuted MNIST.

The arms called short, and the search for a lambda that does something, take a tenth of the time:
one epoch at ten times the rate. The search found none.
"""

from experiments.studies.reproduce.protocol import Arm, Protocol, Reference

WHERE = "its README, permuted MNIST, EWC: ACC=0.83 where the paper has 0.94"
NAIVE = "Naive"
BUILTIN = {"mode": "separate", "method": "avalanche-ewc"}
PREDICTED = {"mode": "separate", "method": "ewc", "fisher_type": "predicted"}
SHORT = {"epochs": 1, "learning_rate": 1e-2}

PROTOCOL = Protocol(
    name="baselines",
    source="ContinualAI, continual-learning-baselines, experiments/permuted_mnist/ewc.py",
    setting={
        "benchmark": "permuted",
        "scenario": "domain",
        "n_experiences": 10,
        "epochs": 10,
        "batch_size": 256,
        "hidden_size": 512,
        "hidden_layers": 1,
        "optimizer": "sgd",
        "learning_rate": 1e-3,
    },
    arms=(
        Arm(NAIVE, {"method": "naive"}, Reference(0.83, 0.015, f"{WHERE} (that is EWC's)")),
        Arm(
            "Avalanche's EWC, λ = 1",
            {**BUILTIN, "ewc_lambda": 1.0},
            Reference(0.83, 0.015, WHERE),
            NAIVE,
        ),
        Arm("predicted, λ = 1", {**PREDICTED, "ewc_lambda": 1.0}, None, NAIVE),
        Arm(f"{NAIVE}, short", {**SHORT, "method": "naive"}),
        *(
            Arm(f"{label}, short", {**SHORT, **ewc, "ewc_lambda": value}, None, f"{NAIVE}, short")
            for label, ewc, value in (
                ("Avalanche's EWC, λ = 1", BUILTIN, 1.0),
                ("predicted, λ = 1", PREDICTED, 1.0),
                ("predicted, λ = 30", PREDICTED, 30.0),
            )
        ),
    ),
    seeds=(0, 1, 2),
    search=(
        {**SHORT, "method": "naive"},
        *({**SHORT, **PREDICTED, "ewc_lambda": x} for x in (1.0, 3.0, 10.0, 30.0)),
        *({**SHORT, **BUILTIN, "ewc_lambda": x} for x in (1.0, 10.0, 100.0, 1000.0)),
    ),
    digits={"epochs": 2, "hidden_size": 24, "batch_size": 32, "n_experiences": 3},
)
