"""Putting a layer behind a module of somebody else's model, without changing the name of anything in it.

A forward hook calls the layer on what the module returns, so any module of any model will do; the names of parameters
stay, and the layer's own are found below the module: ``relu1.dropout.key``. Where the module is an ``nn.Sequential``
the layer simply becomes one of its children. A layer attached later is called later.
"""

from functools import partial
from typing import Any

from torch import nn

_HOOK = "_attached"  # names of the children that a hook calls, in order


def attach(module: nn.Module, name: str, layer: nn.Module) -> None:
    """Let ``layer`` work on the output of ``module``, as its child ``name``.

    Raises:
        ValueError: it has something of that name already.
    """
    _add(module, name, layer)
    if isinstance(module, nn.Sequential):
        return
    if _HOOK not in vars(module):
        setattr(module, _HOOK, [])
        module.register_forward_hook(_through)
    vars(module)[_HOOK].append(name)


def attach_first(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Let ``layer`` work on the first input of ``model`` before anything else does.

    Raises:
        ValueError: it has something of that name already.
    """
    _add(model, name, layer)
    if isinstance(model, nn.Sequential):
        others = {other: model._modules.pop(other) for other in [*model._modules] if other != name}
        model._modules.update(others)
    else:
        model.register_forward_pre_hook(partial(_before, name))


def attached(module: nn.Module) -> tuple[str, ...]:
    """Names of the layers behind a module, in order."""
    return tuple(vars(module).get(_HOOK, ()))


def only_attached(module: nn.Module) -> bool:
    """Whether a module has no other hook than the one of :func:`attach`."""
    hooks = (module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and all(hook is _through for hook in module._forward_hooks.values())


def _add(module: nn.Module, name: str, layer: nn.Module) -> None:
    if hasattr(module, name):
        raise ValueError(f"the model has {name} already, at {type(module).__name__}")
    module.add_module(name, layer.train(module.training))


def _through(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    for name in vars(module)[_HOOK]:
        output = module._modules[name](output)  # type: ignore[misc]
    return output


def _before(name: str, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (module._modules[name](args[0]), *args[1:])  # type: ignore[misc]
