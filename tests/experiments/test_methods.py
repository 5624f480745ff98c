"""Methods beside EWC, the loss over current classes, and the cosine head."""

import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import nn

from experiments.data.sources import find_data
from experiments.settings.grids import Sweep
from experiments.settings.run import RunSettings
from experiments.training.networks import make_model
from experiments.training.run import Run, run

DIGITS = find_data("digits", None)
PENALTY = {"ewc_lambda": 10.0, "mode": "separate"}
OF = {
    "naive": {},
    "joint": {},
    "avalanche-ewc": PENALTY,
    "ewc": PENALTY | {"fisher_type": "predicted"},
    "l2": PENALTY,
    "si": {"ewc_lambda": 10.0},
    "mas": {"ewc_lambda": 1.0},
    "lwf": {"ewc_lambda": 1.0},
    "replay": {"memory": 50},
    "ewc+replay": PENALTY | {"fisher_type": "predicted", "memory": 50},
}


def settings(method, scenario="class", benchmark="split", **changes):
    fields = {"n_experiences": 2, "epochs": 3, "batch_size": 32, "hidden_size": 16}
    return RunSettings(benchmark, "digits", scenario, method, 0, **(fields | OF[method] | changes))


def trained(run_settings):
    current = Run(run_settings, DIGITS)
    current.run(lambda done, accuracy: None)
    return current


def weights(current):
    return torch.cat([p.detach().flatten() for p in current.model.parameters()])


@pytest.mark.parametrize("scenario", ["task", "class"])
@pytest.mark.parametrize("method", ["l2", "si", "mas", "lwf", "replay", "ewc+replay"])
def test_a_method_gives_the_same_bits_on_either_data_path(method, scenario):
    fast = trained(settings(method, scenario))
    classic = trained(settings(method, scenario, data_path="classic"))
    assert torch.equal(weights(fast), weights(classic))
    assert [row["accuracy"] for row in fast.rows] == [row["accuracy"] for row in classic.rows]


@pytest.mark.parametrize("method", ["l2", "si", "mas", "lwf", "replay", "ewc+replay"])
def test_a_method_differs_from_naive_and_says_what_it_keeps(method):
    of_method = trained(settings(method, "domain", "permuted"))
    assert not torch.equal(
        weights(of_method), weights(trained(settings("naive", "domain", "permuted")))
    )
    assert of_method.record("ok", "")["penalty_state_mb"] > 0


@pytest.mark.parametrize("method", ["l2", "lwf", "ewc", "ewc+replay"])
def test_a_strength_of_zero_is_naive(method):
    zero = trained(settings(method, "domain", ewc_lambda=0.0))
    without = settings("replay" if "replay" in method else "naive", "domain")
    assert torch.equal(weights(zero), weights(trained(without)))


def test_si_weighs_each_weight_by_its_share_of_the_fall_of_the_loss():
    path, importance = {}, {}

    class Note(SupervisedPlugin):
        def before_training_iteration(self, strategy, **kwargs):
            self.before = weights(current).double()

        def before_training_exp(self, strategy, **kwargs):
            self.start, self.sum = weights(current).double(), 0.0

        def after_update(self, strategy, **kwargs):
            g = torch.cat([p.grad.flatten() for p in current.model.parameters()]).double()
            self.sum = self.sum - g * (weights(current).double() - self.before)

        def after_training_exp(self, strategy, **kwargs):
            moved = weights(current).double() - self.start
            path["omega"] = path.get("omega", 0.0) + self.sum / (moved.square() + 1e-7)

    current = Run(settings("si", "domain"), DIGITS)
    make = current._strategy

    def with_note(stream):
        strategy, watch = make(stream)
        strategy.plugins.insert(0, Note())
        return strategy, watch

    current._strategy = with_note
    current.run(lambda done, accuracy: None)
    (plugin,) = current.method.late
    importance = torch.cat([p.data.double() for p in plugin.ewc_data[1].values()])
    assert float(importance.abs().max()) > 0
    expected = path["omega"].clamp(max=0.001)
    torch.testing.assert_close(importance, expected, rtol=1e-3, atol=1e-6)


def test_l2_pulls_each_weight_to_where_every_experience_left_it():
    current = Run(settings("l2", "domain", n_experiences=5), DIGITS)
    left = []

    def note(done, accuracy):
        left.append(weights(current).double())

    current.run(note)
    (plugin,) = current.method.late
    at = torch.randn_like(left[-1]) * 0.1
    with torch.no_grad():
        nn.utils.vector_to_parameters(at.float(), current.model.parameters())
    expected = sum((at.float().double() - theta).square().sum() for theta in left)
    assert float(plugin.penalty(current.model).detach()) == pytest.approx(float(expected), rel=1e-5)


def test_l2_leaves_the_heads_of_other_tasks_free():
    current = trained(settings("l2", "task"))
    (plugin,) = current.method.late
    model = current.model
    before = float(plugin.penalty(model).detach())
    with torch.no_grad():
        model.classifier.classifiers["1"].classifier.weight += 1.0
    size = model.classifier.classifiers["1"].classifier.weight
    anchored_once = float(plugin.penalty(model).detach()) - before
    assert anchored_once == pytest.approx(size.numel(), rel=1e-4)  # by experience 1, not by 0


def test_the_loss_over_current_classes_leaves_the_others_alone():
    moved = {}
    for classes in (None, "current"):
        current = Run(settings("naive", n_experiences=5, loss_classes=classes), DIGITS)
        biases = []
        current.run(lambda done, accuracy: biases.append(current.model[1].bias.detach().clone()))  # noqa: B023
        moved[classes] = biases[4] - biases[0]
    assert bool((moved[None][:2] < 0).all())  # pushed down by every other experience
    assert bool((moved["current"][:2].abs() < moved[None][:2].abs()).all())


def test_the_loss_over_current_classes_is_a_softmax_over_them():
    import torch.nn.functional as F

    from experiments.training.methods import CurrentClasses

    criterion = CurrentClasses()
    criterion._adaptation({2, 3})
    torch.manual_seed(0)
    logits, y = torch.randn(7, 10, dtype=torch.float64), torch.tensor([2, 3, 2, 2, 3, 3, 2])
    expected = F.cross_entropy(logits[:, 2:4], y - 2)
    torch.testing.assert_close(criterion(logits, y), expected)
    criterion.before_eval(None)
    torch.testing.assert_close(criterion(logits, y), F.cross_entropy(logits, y))
    criterion.after_eval(None)
    torch.testing.assert_close(criterion(logits, y), expected)


@pytest.mark.parametrize("fisher_type", ["predicted", "exact", "empirical", "sampled"])
def test_the_fisher_runs_over_the_classes_of_the_loss(fisher_type):
    classes = {"n_experiences": 5, "loss_classes": "current"}
    current = trained(settings("ewc", fisher_type=fisher_type, **classes))
    (plugin,) = current.method.late
    bias = next(f for n, f in plugin.fisher.items() if n == "1.bias")
    assert bool((bias[:8] == 0).all())  # of the last experience, whose classes are 8 and 9
    assert bool((bias[8:] > 0).all())


def test_the_evaluated_loss_is_over_all_classes():
    current = trained(settings("naive", n_experiences=5, loss_classes="current"))
    losses = {r["eval_exp"]: r["loss"] for r in current.rows if r["train_exp"] == 4}
    assert losses[0] > 0.1  # whose classes the last experience's loss would leave out


def test_a_cosine_head_is_ten_times_the_cosine():
    run_settings = settings("naive", head="cosine")
    current = trained(run_settings)
    x = torch.randn(5, 1, 8, 8)
    features = current.model[0](x).double()
    weight = current.model[1].weight.double()
    cosine = (features @ weight.T) / features.norm(dim=1)[:, None] / weight.norm(dim=1)
    torch.testing.assert_close(current.model(x).double(), 10 * cosine, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fisher_type", ["predicted", "exact"])
def test_ewc_with_a_cosine_head_runs(fisher_type):
    run_settings = settings("ewc", head="cosine", loss_classes="current", fisher_type=fisher_type)
    record = run(run_settings, DIGITS).record
    assert record["status"] == "ok", record["reason"]
    assert (record["head"], record["loss_classes"]) == ("cosine", "current")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"scenario": "domain", "loss_classes": "current"},
            "`loss_classes` must be all outside",
        ),
        ({"method": "joint", "loss_classes": "current"}, "`loss_classes` must be all for joint"),
        ({"method": "replay", "loss_classes": "current"}, "`loss_classes` must be all for replay"),
        ({"scenario": "task", "head": "cosine"}, "`head` must be linear in scenario task"),
        ({"method": "replay", "memory": None}, "`memory` must be given for replay"),
        ({"method": "naive", "memory": 10}, "`memory` must be unset for naive"),
        ({"method": "replay", "memory": 0}, "`memory` must be a whole number, >= 1"),
        ({"method": "si", "ewc_lambda": None}, "`ewc_lambda` must be given for si"),
        ({"method": "l2", "mode": None}, "`mode` must be one of separate, online for l2"),
        ({"method": "ewc+replay", "fisher_type": None}, "`fisher_type` must be one of"),
    ],
)
def test_a_setting_without_meaning_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        settings(**({"method": "naive"} | change))


def test_a_grid_gives_each_method_what_it_has():
    grid = Sweep(
        methods=tuple(OF),
        benchmark=("split",),
        scenario=("class", "domain"),
        loss=("all", "current"),
        head=("linear", "cosine"),
        memory=(20, 50),
        ewc_lambda=(1.0,),
        seeds=(0,),
    )
    cells = list(grid.cells("digits"))
    for scenario, losses in (("class", 2), ("domain", 1)):
        count = {m: sum(c.method == m and c.scenario == scenario for c in cells) for m in OF}
        heads = 2
        assert count == {
            **dict.fromkeys(
                ("naive", "avalanche-ewc", "ewc", "l2", "si", "mas", "lwf"), heads * losses
            ),
            "joint": heads,
            "replay": heads * 2,
            "ewc+replay": heads * 2,
        }


def test_the_chosen_lambdas_are_for_the_plain_loss_and_head():
    with pytest.raises(ValueError, match="`ewc_lambda` must be given with `head` cosine"):
        Sweep(head=("cosine",))
    with pytest.raises(ValueError, match="`ewc_lambda` must be given for si"):
        list(Sweep(methods=("si",)).cells("digits"))


def test_a_cosine_head_and_the_model_have_one_weight_less():
    from experiments.data.streams import make_stream

    stream = make_stream(settings("naive"), DIGITS)
    linear, cosine = (
        sum(p.numel() for p in make_model(settings("naive", head=h), stream).parameters())
        for h in (None, "cosine")
    )
    assert linear - cosine == 10
