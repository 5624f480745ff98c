"""Select the trainable parameters, and warn of those that do not affect the outputs."""

import warnings

import torch
from torch import Tensor, nn

from ewc_plugin.batches import Batch, copied
from ewc_plugin.fisher.model_call import ModelCall
from ewc_plugin.fisher.tracing.layer_calls import parameters_in_graph


def check_model(model: object) -> None:
    """Raise if no Fisher can be computed for a model, whatever the data.

    Args:
        model: Of `diagonal_fisher`.

    Raises:
        TypeError: It is no `nn.Module`.
        ValueError: It has no trainable parameter, or one that has no diagonal Fisher.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be an nn.Module, got {type(model).__name__}.")
    params = trainable(model)
    if not params:
        raise ValueError("`model` has no parameter with requires_grad=True, so it has no Fisher.")
    lazy = [n for n, p in params.items() if isinstance(p, nn.parameter.UninitializedParameter)]
    params = {name: p for name, p in params.items() if name not in lazy}
    for kind, found, remedy in (
        ("not initialised", lazy, "Run the model once"),
        ("complex", [n for n, p in params.items() if p.is_complex()], "Use its real view"),
        ("sparse", [n for n, p in params.items() if p.layout != torch.strided], "Make it dense"),
        ("on the meta device", [n for n, p in params.items() if p.is_meta], "Give it values"),
        (
            "an inference tensor",
            [n for n, p in params.items() if p.is_inference()],
            "Make the model outside of torch.inference_mode()",
        ),
    ):
        if found:
            raise ValueError(
                f"`model` has a parameter that is {kind} ({', '.join(found)}), which has no "
                f"diagonal Fisher. {remedy}, or freeze it."
            )


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters with requires_grad=True, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def warn_of_parameters_without_effect(
    call: ModelCall, batch: Batch, fisher: dict[str, Tensor], reached: frozenset[str]
) -> None:
    """Warn where all parameters, or some in eval mode alone, do not affect the outputs: F is zero.

    Layers that merge their weights in `eval()`, as LoRA's do, have such parameters. Some of which
    the outputs do not depend in either mode, such as another task's head, are no matter.

    Args:
        call: The model, in eval mode.
        batch: A few samples.
        fisher: What was computed.
        reached: Names of parameters that the outputs are known to depend on.
    """
    zero = {n: p for n, p in call.params.items() if n not in reached and not bool(fisher[n].any())}
    if not zero:
        return
    call.state.restore()
    try:
        call.model.train()
        with torch.enable_grad():
            in_train_mode = parameters_in_graph(call.functional(call.model, copied(batch)))
        call.model.eval()
        in_eval_mode = parameters_in_graph(call.logits(copied(batch)))
    except Exception:  # the model's code may raise anything in train mode
        return
    finally:
        call.model.eval()
        call.state.restore(values=True)
    names = [n for n, p in zero.items() if id(p) in in_train_mode and id(p) not in in_eval_mode]
    if names:
        warnings.warn(
            f"The outputs depend on {', '.join(names)} in train mode, but not in eval mode, in "
            "which the Fisher is computed: it is zero there, so nothing protects these parameters. "
            "Layers that merge their weights in eval() are a usual reason; switch that off.",
            stacklevel=3,
        )
    elif len(zero) == len(call.params) and not {id(p) for p in zero.values()} & in_eval_mode:
        warnings.warn(
            "The outputs depend on no parameter with requires_grad=True, so the Fisher is zero. "
            "Does `forward` run under torch.no_grad(), detach its outputs, or take other weights "
            "than the model's?",
            stacklevel=3,
        )
