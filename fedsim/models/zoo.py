"""The table of models, and the check that a model, above all one from outside, can be trained here.

Every factory returns a module from inputs (batch, *input_shape) to logits (batch, classes), or (batch, time, classes)
for sequences. Its layers are plain ``nn.Conv2d`` and ``nn.Linear`` with stable names, and the last is ``head``.
A module draws its first weights from torch's generator while it is built: build inside ``rng.torch_seeded(key)``.
"""

import copy
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy

from fedsim import params as p
from fedsim import rng
from fedsim.errors import ConfigError
from fedsim.models.cifarnet import m_cifarnet, m_cifarnet_small
from fedsim.models.convolutional import cnn, conv_2, conv_4, conv_6
from fedsim.models.fractal import fractal
from fedsim.models.layers.dropouts import unkeyed
from fedsim.models.layers.keyed import Keyed, adds_axis, key_names, progress_names, step_keys
from fedsim.models.mlp import lenet_300_100, linear, mlp, two_nn
from fedsim.models.recurrent import char_lstm
from fedsim.models.residual import resnet, resnet_8, resnet_20
from fedsim.models.residual_mlp import residual_mlp
from fedsim.records import Params


def check_model(
    model: nn.Module, input_shape: tuple[int, ...], num_classes: int, example_input: Tensor, *, name: str
) -> str:
    """Refuse a model that cannot be trained here. ``model`` itself is not changed.

    It runs on two copies of the example, in evaluation mode and in training mode, and may draw from torch's global
    generator in training only, where a client's training can be seeded (``LocalWork.seeded``). The logits need the
    right shape and finite values. No keyed layer may be called more than once in one pass, since its second draws
    would equal its first.

    All clients train in one module, so nothing may pass from one call to the next but through persistent buffers,
    which are handed in and out: called twice with the same parameters, buffers, keys and seed of torch's generator,
    the model must return the same bits and draw as much, and a buffer must be updated in place. What two calls do
    not show is not found.

    Args:
        model: built, perhaps after ``replace_dropout``.
        input_shape: of one example.
        num_classes: number of logits.
        example_input: one example (*input_shape).
        name: the model as the config names it, for messages.

    Returns:
        Where the model draws from torch's global generator in training: its layers that do, or "in its forward code";
        "" if it does not.

    Raises:
        ConfigError: names the model, the rule and what was found.
    """
    _check_parameters(model, name)
    model, fresh = copy.deepcopy(model), copy.deepcopy(model)
    inputs = torch.stack([example_input, example_input])
    evaluated = _run(model.eval(), inputs, name)
    _check_logits(evaluated.returned, input_shape, num_classes, inputs, name)
    if evaluated.drew:
        raise ConfigError(
            f"model.name: {name} draws from torch's global generator in evaluation mode, in which it must return the "
            "same each time; draw in training only, as F.dropout(x, p, training=self.training) does"
        )
    trained = _run_watched(model.train(), inputs, name)
    if not adds_axis(model):
        _check_logits(trained.returned, input_shape, num_classes, inputs, name)
    _check_memory(fresh, inputs, name)
    return (", ".join(unkeyed(model)) or "in its forward code") if trained.drew else ""


def check_single(
    model: nn.Module, input_shape: tuple[int, ...], num_classes: int, example_input: Tensor, *, name: str
) -> None:
    """Refuse a model that cannot be trained on a batch of one example, as batch norm cannot. It is not changed.

    Args, Raises: as for :func:`check_model`.
    """
    inputs = example_input[None]
    ran = _run(copy.deepcopy(model).train(), inputs, name)
    if not adds_axis(model):
        _check_logits(ran.returned, input_shape, num_classes, inputs, name)


def _check_parameters(model: nn.Module, name: str) -> None:
    for path, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ConfigError(f"model.name: {name}: parameters need a shape, {path} gets it in the first call only")
        if not parameter.is_floating_point():
            raise ConfigError(f"model.name: {name}: parameters must be floating, {path} is {parameter.dtype}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"model.name: {name} has no trainable parameters")


class _Ran(NamedTuple):
    """What the model returned, whether it drew from torch's global generator, and that generator's last state."""

    returned: object
    drew: bool
    generator: Tensor


def _run(model: nn.Module, inputs: Tensor, name: str, state: Params | None = None) -> _Ran:
    """Call the model, with ``state`` in the place of its own, always from the same seed; refuses one that fails."""
    with torch.no_grad(), rng.torch_seeded(0):
        before = torch.get_rng_state()
        try:
            returned = model(inputs) if state is None else functional_call(model, state, (inputs,))
        except Exception as error:
            got = f"inputs of shape {tuple(inputs.shape)}, {inputs.dtype}"
            raise ConfigError(f"model.name: {name} failed on {got}: {error}") from error
        after = torch.get_rng_state()
    return _Ran(returned, not torch.equal(before, after), after)


def _check_logits(logits: object, input_shape: tuple[int, ...], num_classes: int, inputs: Tensor, name: str) -> None:
    allowed: list[tuple[int, ...]] = [(len(inputs), num_classes)]
    if len(input_shape) == 1 and not inputs.is_floating_point():
        allowed.append((len(inputs), input_shape[0], num_classes))
    must = f"must return a tensor of shape {' or '.join(map(str, allowed))} for inputs {tuple(inputs.shape)}"
    if not isinstance(logits, Tensor):
        raise ConfigError(f"model.name: {name} {must}, returned {type(logits).__name__}")
    if tuple(logits.shape) not in allowed:
        raise ConfigError(f"model.name: {name} {must}, returned shape {tuple(logits.shape)}")
    if not bool(torch.isfinite(logits).all()):
        raise ConfigError(f"model.name: {name} returned NaN or infinite values before any training")


def _run_watched(model: nn.Module, inputs: Tensor, name: str) -> _Ran:
    """As :func:`_run`; refuses keyed layers called twice, and buffers that are replaced instead of changed, too."""
    calls: Counter[str] = Counter()
    for path, module in model.named_modules():
        if isinstance(module, Keyed):
            module.register_forward_hook(lambda *_, path=path: calls.update([path]))
    before = {path: buffer for path, buffer in model.named_buffers() if path in model.state_dict()}
    ran = _run(model, inputs, name)
    repeated = [path for path, count in calls.items() if count > 1]
    if repeated:
        raise ConfigError(
            f"model.name: {name} calls {', '.join(repeated)} more than once in a forward pass, and each call would "
            "draw the same numbers; give each its own layer"
        )
    after = dict(model.named_buffers())
    replaced = [path for path, buffer in before.items() if after.get(path) is not buffer]
    if replaced:
        raise ConfigError(
            f"model.name: {name} assigns a new tensor to buffer {', '.join(replaced)} in its forward pass, which would "
            "be lost; update buffers in place, with copy_ or lerp_"
        )
    return ran


def _check_memory(model: nn.Module, inputs: Tensor, name: str) -> None:
    """Calls the model twice as training and evaluation do; refuses one that remembers the first time."""
    trainable, buffers = p.of(model)
    not_handed = {n: b.clone() for n, b in model.named_buffers() if n not in buffers.keys() | _handed(model)}
    first = _as_in_a_run(model, trainable, buffers, inputs, name)
    second = _as_in_a_run(model, trainable, buffers, inputs, name)
    after = dict(model.named_buffers())
    if changed := [n for n, b in not_handed.items() if n not in after or not p.same_bits({n: b}, {n: after[n]})]:
        raise ConfigError(
            f"model.name: {name} changes buffer {', '.join(changed)} in its forward pass, which is not persistent: its "
            "values would pass from client to client and be lost on resume; register it with persistent=True"
        )
    if not p.same_bits(trainable, p.of(model)[0]):
        raise ConfigError(f"model.name: {name} changes its own parameters in its forward pass; only training may")
    if different := [mode for mode in first if not p.same_bits(first[mode], second[mode])]:
        raise ConfigError(
            f"model.name: {name} returns or draws something else when called again with the same inputs, parameters, "
            f"buffers, keys and seed ({' and '.join(different)} mode). What it keeps from call to call would pass from "
            "client to client and be lost on resume, unless it is a persistent buffer; randomness of numpy, Python's "
            "random or a generator of its own cannot be keyed: draw with torch.rand and the like, or by keyed layers"
        )


def _handed(model: nn.Module) -> set[str]:
    """Buffers that training hands in for every step."""
    return {*key_names(model), *progress_names(model)}


def _as_in_a_run(model: nn.Module, trainable: Params, buffers: Params, inputs: Tensor, name: str) -> dict[str, Params]:
    """What the model returns in either mode, with all of its state handed in, and what is left of the generator."""
    found = {}
    for mode in ("training", "evaluation"):
        handed = {path: buffer.clone() for path, buffer in buffers.items()}
        state = {**trainable, **handed, **step_keys(key_names(model), 0)}
        ran = _run(model.train(mode == "training"), inputs, name, state)
        assert isinstance(ran.returned, Tensor)  # as it was for _check_logits
        found[mode] = {"returned": ran.returned, "generator": ran.generator}
        if mode == "evaluation" and not p.same_bits(handed, buffers):
            raise ConfigError(f"model.name: {name} changes buffers in evaluation mode; only training may")
    return found


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
    "residual-mlp": residual_mlp,
    "fractal": fractal,
    "m-cifarnet": m_cifarnet,
    "m-cifarnet-small": m_cifarnet_small,
    "char-lstm": char_lstm,
}
