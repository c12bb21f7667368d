"""The batch norms of a model, found by their class, whatever their names: what they hold, and how to freeze them."""

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedsim.models.places import join

HAVE_IT = "mlp, cnn, resnet-8 and all others with a key norm (fedsim list models) have it with norm: batch"


def tensors(model: nn.Module) -> tuple[str, ...]:
    """Names of all that batch norms hold: scale, shift, running mean, running variance, counter.

    Raises:
        ValueError: the model has no batch norm.
    """
    persistent = model.state_dict().keys()
    return tuple(
        join(path, name)
        for path, module in _norms(model)
        for name in [*module._parameters, *module._buffers]
        if join(path, name) in persistent
    )


def statistics(model: nn.Module) -> tuple[tuple[str, str], ...]:
    """Names of running mean and running variance, of each batch norm.

    Raises:
        ValueError: there is no batch norm, or one without running statistics.
    """
    return tuple((join(path, "running_mean"), join(path, "running_var")) for path, _ in _tracking(model))


def freeze(model: nn.Module) -> None:
    """Make batch norms fixed maps, in place: they use their running statistics in training as well, and learn nothing.

    ``y = gamma * (x - running_mean) / sqrt(running_var + eps) + beta``. Scale and shift need no gradient any more, so
    they are sent like buffers and stay bit for bit.

    Raises:
        ValueError: there is no batch norm, or one without running statistics.
    """
    for _, module in _tracking(model):
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)
        module.register_forward_pre_hook(_evaluating)


def _evaluating(module: nn.Module, inputs: object) -> None:
    """Undo ``model.train()``, before each call."""
    module.training = False


def _tracking(model: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    for path, module in _norms(model):
        if module.running_mean is None:
            raise ValueError(f"needs running statistics, but the batch norm {path or 'of the model'} keeps none")
        yield path, module


def _norms(model: nn.Module) -> list[tuple[str, _BatchNorm]]:
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, _BatchNorm)]
    if not found:
        raise ValueError(f"needs batch norm, but the model has none; {HAVE_IT}")
    return found
