"""Avalanche's continual-learning-baselines: its EWC on permuted MNIST, and what a lambda gives."""

from experiments.protocol import Arm, Protocol, Reference

WHERE = "continual-learning-baselines, permuted MNIST, as quoted in the issue"
NAIVE = "Naive"
BUILTIN = {"mode": "separate", "method": "avalanche-ewc"}
PREDICTED = {"mode": "separate", "method": "ewc", "fisher_type": "predicted"}

PROTOCOL = Protocol(
    name="baselines",
    source="ContinualAI, continual-learning-baselines, experiments/permuted_mnist/ewc.py",
    setting={
        "benchmark": "permuted",
        "scenario": "domain",
        "n_experiences": 10,
        "epochs": 1,
        "batch_size": 256,
        "hidden_size": 512,
        "hidden_layers": 1,
        "optimizer": "sgd",
        "learning_rate": 1e-2,
    },
    arms=(
        Arm(NAIVE, {"method": "naive"}, Reference(0.83, 0.015, f"{WHERE}: its EWC's")),
        Arm(
            "Avalanche's EWC, λ = 1",
            {**BUILTIN, "ewc_lambda": 1.0},
            Reference(0.83, 0.015, WHERE),
            NAIVE,
        ),
        Arm(
            "predicted, λ = 1",
            {**PREDICTED, "ewc_lambda": 1.0},
            None,
            NAIVE,
        ),
        Arm("predicted, λ = 30", {**PREDICTED, "ewc_lambda": 30.0}, None, NAIVE),
    ),
    seeds=(0, 1, 2),
    search=(
        *({**PREDICTED, "ewc_lambda": x} for x in (1.0, 3.0, 10.0)),
        *({**BUILTIN, "ewc_lambda": x} for x in (10.0, 100.0, 1000.0)),
    ),
    reduced="one epoch at rate 1e-2 instead of ten at 1e-3: rate times steps is the same",
    digits={"epochs": 2, "hidden_size": 24, "batch_size": 32, "n_experiences": 3},
)
