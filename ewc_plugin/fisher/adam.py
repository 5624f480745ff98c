"""Adam's second moments as an importance: nothing is computed."""

import torch
from torch import nn
from torch.optim import Adam, AdamW, Optimizer

from ewc_plugin.fisher.parameters import check_model, trainable
from ewc_plugin.fisher.result import Fisher


def adam_fisher(optimizer: Optimizer, model: nn.Module, *, batch_size: int = 1) -> Fisher:
    """The squared gradients that Adam has averaged during the training ("Squisher").

    F_i = batch_size * v_i / (1 - beta_2^t), with v the second moment and t the steps taken. The
    moment averages squares of mini-batch gradients over some 1 / (1 - beta_2) past steps, at the
    data's labels, at parameters that moved. It is no Fisher information: the square of a mean over
    B samples is about 1/B of the mean square where the mean is near zero, which `batch_size` makes
    up for, and otherwise between that and the mean square itself. What else was in the loss, such
    as a penalty, is in it too.

    Args:
        optimizer: `Adam` or `AdamW` that has taken a step.
        model: Its trainable parameters are the optimizer's.
        batch_size: Number B of samples whose mean loss was minimised; 1 leaves the moments as
            they are.

    Returns:
        One tensor per trainable parameter, by name, as `diagonal_fisher` returns them; zeros for a
        parameter that never had a gradient. Unit: (that of the loss / theta)^2.

    Raises:
        TypeError: The optimizer is another one.
        ValueError: It has taken no step, has `amsgrad` or a `weight_decay` in the gradients, or
            lacks a trainable parameter of the model.

    Source: "Fishers for Free? Approximating the Fisher Information Matrix by Recycling the Squared
        Gradient Accumulator", 2025, arXiv 2507.18807.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> optimizer = Adam(model.parameters())
        >>> model(torch.full((1, 1), 3.0)).sum().backward()
        >>> optimizer.step()
        >>> adam_fisher(optimizer, model)
        {'weight': tensor([[9.]])}
    """
    if not isinstance(optimizer, Adam | AdamW):
        raise TypeError(
            f"`optimizer` must be Adam or AdamW, which average squared gradients, got "
            f"{type(optimizer).__name__}. Use `diagonal_fisher`."
        )
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"`batch_size` must be a whole number >= 1, got {batch_size!r}.")
    check_model(model)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    parameters = trainable(model)
    _check(optimizer, parameters, groups)
    found = {}
    for name, p in parameters.items():
        state, dtype = optimizer.state.get(p), torch.promote_types(p.dtype, torch.float32)
        if not state:
            found[name] = torch.zeros_like(p, dtype=dtype)
            continue
        beta, steps = float(groups[id(p)]["betas"][1]), float(state["step"])
        found[name] = state["exp_avg_sq"].detach().to(dtype) * (batch_size / (1 - beta**steps))
    return Fisher(found, fisher_type="adam")


def _check(
    optimizer: Optimizer, parameters: dict[str, nn.Parameter], groups: dict[int, dict[str, object]]
) -> None:
    if missing := [name for name, p in parameters.items() if id(p) not in groups]:
        raise ValueError(
            f"`optimizer` has no moments of {', '.join(missing)}: it does not optimise them. "
            "Freeze them (requires_grad=False), or pass the optimizer that does."
        )
    if not any(optimizer.state.get(p) for p in parameters.values()):
        raise ValueError(
            "`optimizer` has no state yet: call `adam_fisher` after training, before an optimizer "
            "is made anew."
        )
    used = [groups[id(p)] for p in parameters.values()]
    if any(group.get("amsgrad") for group in used):
        raise ValueError(
            "`optimizer` has amsgrad=True, whose moments are largest values, not averages. Use "
            "amsgrad=False, or `diagonal_fisher`."
        )
    decoupled = isinstance(optimizer, AdamW) or any(g.get("decoupled_weight_decay") for g in used)
    if not decoupled and any(group["weight_decay"] for group in used):
        raise ValueError(
            "`optimizer` is Adam with a `weight_decay`, which adds the weights to the gradients "
            "whose squares are averaged. Use AdamW, or weight_decay=0."
        )
