"""The table of models, and the check that a model, above all one from outside, can be trained here.

Every factory returns a module from inputs (batch, *input_shape) to logits (batch, classes), or (batch, time, classes)
for sequences. Its layers are plain ``nn.Conv2d`` and ``nn.Linear`` with stable names, and the last is ``head``.
A module draws its first weights from torch's generator while it is built: build inside ``rng.torch_seeded(key)``.
"""

import copy
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fedsim import rng
from fedsim.errors import ConfigError
from fedsim.models.convolutional import cnn, conv_2, conv_4, conv_6
from fedsim.models.layers.dropouts import unkeyed
from fedsim.models.layers.keyed import Keyed
from fedsim.models.mlp import lenet_300_100, linear, mlp, two_nn
from fedsim.models.recurrent import char_lstm
from fedsim.models.residual import resnet, resnet_8, resnet_20


def check_model(
    model: nn.Module, input_shape: tuple[int, ...], num_classes: int, example_input: Tensor, *, name: str
) -> None:
    """Refuse a model that cannot be trained here. ``model`` itself is not changed.

    It runs on two copies of the example, in evaluation mode and in training mode, and may draw nothing from torch's
    global generator. The logits need the right shape and finite values. No keyed layer may be called more than once
    in one pass, since its second draws would equal its first.

    Args:
        model: built, perhaps after ``replace_dropout``.
        input_shape: of one example.
        num_classes: number of logits.
        example_input: one example (*input_shape).
        name: the model as the config names it, for messages.

    Raises:
        ConfigError: names the model, the rule and what was found.
    """
    _check_parameters(model, name)
    model = copy.deepcopy(model)
    inputs = torch.stack([example_input, example_input])
    _check_logits(_run(model.eval(), inputs, name), input_shape, num_classes, inputs, name)
    _check_calls(model.train(), inputs, name)


def _check_parameters(model: nn.Module, name: str) -> None:
    for path, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise ConfigError(f"model.name: {name}: parameters must be floating, {path} is {parameter.dtype}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"model.name: {name} has no trainable parameters")


def _run(model: nn.Module, inputs: Tensor, name: str) -> object:
    """What the model returns; refuses one that fails or that moves torch's generator."""
    with torch.no_grad(), rng.torch_seeded(0):
        before = torch.get_rng_state()
        try:
            returned = model(inputs)
        except Exception as error:
            got = f"inputs of shape {tuple(inputs.shape)}, {inputs.dtype}"
            raise ConfigError(f"model.name: {name} failed on {got}: {error}") from error
        drew = not torch.equal(before, torch.get_rng_state())
    if drew:
        where = ", ".join(unkeyed(model)) or "in its forward code"
        raise ConfigError(
            f"model.name: {name} draws from torch's global generator ({where}); a run could not be repeated. "
            "Use keyed layers such as fedsim.models.layers.dropouts.Dropout"
        )
    return returned


def _check_logits(logits: object, input_shape: tuple[int, ...], num_classes: int, inputs: Tensor, name: str) -> None:
    allowed: list[tuple[int, ...]] = [(2, num_classes)]
    if len(input_shape) == 1 and not inputs.is_floating_point():
        allowed.append((2, input_shape[0], num_classes))
    must = f"must return a tensor of shape {' or '.join(map(str, allowed))} for inputs {tuple(inputs.shape)}"
    if not isinstance(logits, Tensor):
        raise ConfigError(f"model.name: {name} {must}, returned {type(logits).__name__}")
    if tuple(logits.shape) not in allowed:
        raise ConfigError(f"model.name: {name} {must}, returned shape {tuple(logits.shape)}")
    if not bool(torch.isfinite(logits).all()):
        raise ConfigError(f"model.name: {name} returned NaN or infinite values before any training")


def _check_calls(model: nn.Module, inputs: Tensor, name: str) -> None:
    calls: Counter[str] = Counter()
    for path, module in model.named_modules():
        if isinstance(module, Keyed):
            module.register_forward_hook(lambda *_, path=path: calls.update([path]))
    _run(model, inputs, name)
    repeated = [path for path, count in calls.items() if count > 1]
    if repeated:
        raise ConfigError(
            f"model.name: {name} calls {', '.join(repeated)} more than once in a forward pass, and each call would "
            "draw the same numbers; give each its own layer"
        )


MODELS: dict[str, Callable[..., nn.Module]] = {
    "linear": linear,
    "mlp": mlp,
    "2nn": two_nn,
    "cnn": cnn,
    "lenet-300-100": lenet_300_100,
    "conv-2": conv_2,
    "conv-4": conv_4,
    "conv-6": conv_6,
    "resnet": resnet,
    "resnet-8": resnet_8,
    "resnet-20": resnet_20,
    "char-lstm": char_lstm,
}
