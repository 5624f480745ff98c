"""Which Fisher: split MNIST, task-incremental, online EWC as Huszar has it, over lambda."""

from experiments.studies.reproduce.protocol import Arm, Protocol, Reference

WHERE = "van de Ven 2025, arXiv 2502.11756, split MNIST, quoted at second hand"
# Published at the best lambda of 14 decades; the lambda are twice ours, which are tried here.
LAMBDAS = (5e1, 5e3, 5e5, 5e7, 5e9)
TYPES = {"exact": 0.9912, "sampled": 0.9912, "empirical": 0.9912, "batched": 0.9911}
NAIVE = "Naive"


def _arms(fisher_type: str) -> tuple[Arm, ...]:
    ewc = {"method": "ewc", "fisher_type": fisher_type, "mode": "online", "decay_factor": 1.0}
    value = TYPES.get(fisher_type)
    reference = value and Reference(value, 0.005, f"{WHERE}, at its best lambda")
    return tuple(
        Arm(f"{fisher_type}, λ = {x:g}", {**ewc, "ewc_lambda": x}, reference or None, NAIVE)
        for x in LAMBDAS
    )


PROTOCOL = Protocol(
    name="vandeven2025",
    source="van de Ven 2025, On the computation of the Fisher information in continual learning, "
    "arXiv 2502.11756",
    setting={
        "benchmark": "split",
        "scenario": "task",
        "n_experiences": 5,
        "iterations": 500,
        "batch_size": 128,
        "hidden_size": 100,
        "hidden_layers": 2,
        "optimizer": "adam",
        "learning_rate": 1e-3,
    },
    arms=(
        Arm(NAIVE, {"method": "naive"}, Reference(0.8541, 0.05, WHERE)),
        *(arm for t in (*TYPES, "predicted") for arm in _arms(t)),
    ),
    seeds=(0, 1, 2),
    reduced="two hidden layers of 100 instead of 400, 500 iterations per task instead of 2,000, "
    "5 λ instead of 14, three seeds instead of 30",
    digits={"iterations": 60, "hidden_size": 24, "batch_size": 32},
)
