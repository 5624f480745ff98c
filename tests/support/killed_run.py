"""A user's script that goes on from its last checkpoint, and is killed and started again.

python killed_run.py FOLDER [PLACE ...]: the n-th start is killed at the n-th place, "training" or
"evaluation", and the one after the last place ends. Each start is a fork, which has the imports of
this process but nothing of an earlier start. Prints the exit code of each, the
negative signal where it was killed, and keeps the table of the n-th as accuracy-n.csv.
"""

import os
import shutil
import signal
import sys
from pathlib import Path

import dill
import torch
from avalanche.checkpointing import maybe_load_checkpoint, save_checkpoint
from avalanche.core import SupervisedPlugin
from avalanche.evaluation.metrics import accuracy_metrics, loss_metrics
from avalanche.training.determinism.rng_manager import RNGManager
from avalanche.training.plugins import EvaluationPlugin, ReplayPlugin
from torch import nn

from ewc_plugin import DiagonalEWCPlugin, TidyCSVLogger

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.plugin_streams import N_FEATURES, benchmark, strategy


class Mine(nn.Module):  # of the script itself: `__main__.Mine`
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(N_FEATURES, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 4)
        )

    def forward(self, x):
        return self.layers(x)


class Kill(SupervisedPlugin):
    """No chance to tidy up: SIGKILL, in the third of four experiences."""

    place = None

    def after_training_iteration(self, strategy, **kwargs):
        if strategy.experience.current_experience == 2 and strategy.clock.train_exp_iterations == 1:
            self.die("training")

    def after_eval_exp(self, strategy, **kwargs):
        if (strategy.clock.train_exp_counter, strategy.experience.current_experience) == (3, 1):
            self.die("evaluation")

    def die(self, place):
        if place == self.place:
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder, place):
    Kill.place = place
    dill.settings["byref"] = True
    RNGManager.set_random_seeds(1)
    stream = benchmark(n_experiences=4)
    evaluator = EvaluationPlugin(
        accuracy_metrics(experience=True),
        loss_metrics(experience=True),
        loggers=TidyCSVLogger(folder / "accuracy.csv", "run", seed=1),
    )
    plugins = ReplayPlugin(8), DiagonalEWCPlugin(50.0), Kill()
    learner = strategy(Mine(), *plugins, train_epochs=2, evaluator=evaluator)
    learner, done = maybe_load_checkpoint(learner, folder / "checkpoint.pt")
    if not done:
        learner.eval(stream.test_stream)
    for experience in stream.train_stream[done:]:
        learner.train(experience)
        learner.eval(stream.test_stream)
        save_checkpoint(learner, folder / "checkpoint.tmp")
        os.replace(folder / "checkpoint.tmp", folder / "checkpoint.pt")
    torch.save(learner.model.state_dict(), folder / "weights.pt")


def exit_code_of_a_fork(folder, place):
    child = os.fork()
    if not child:
        main(folder, place)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for n, place in enumerate([*sys.argv[2:], None]):
        print(exit_code_of_a_fork(folder, place), flush=True)
        shutil.copy(folder / "accuracy.csv", folder / f"accuracy-{n}.csv")
