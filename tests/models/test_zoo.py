import inspect
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from fedsim import params, rng
from fedsim.errors import ConfigError
from fedsim.models.layers.dropouts import Dropout, replace_dropout
from fedsim.models.layers.keyed import key_names, step_keys
from fedsim.models.zoo import MODELS, check_model, check_single

MNIST, CIFAR, DIGITS, TEXT = (1, 28, 28), (3, 32, 32), (1, 8, 8), (6,)
SMALL = {  # parameters that keep the tests quick; the others run as they are
    "mlp": {"hidden": [7, 5], "dropout": 0.3},
    "cnn": {"channels": [4, 6], "kernel": 3, "hidden": 8, "norm": "batch"},
    "resnet": {"depth": 8, "norm": "batch"},
    "residual-mlp": {"depth": 2, "width": 6, "norm": "batch"},
    "fractal": {"channels": [4, 6], "norm": "batch"},
    "m-cifarnet": {"channels": [4, 5, 6]},
    "m-cifarnet-small": {"channels": [3, 4, 5]},
    "char-lstm": {"embedding": 3, "hidden": 5},
}
FLAT = ["linear", "mlp", "2nn", "lenet-300-100", "residual-mlp"]
IMAGES = ["cnn", "conv-2", "conv-4", "conv-6", "resnet", "resnet-8", "resnet-20", "fractal"]
IMAGES += ["m-cifarnet", "m-cifarnet-small"]
STACKABLE = [name for name in MODELS if name != "char-lstm"]  # torch has no rule for its LSTM: see test_recurrent


def small(name: str, key: int = 0) -> nn.Module:
    shape = TEXT if name == "char-lstm" else DIGITS
    with rng.torch_seeded(key):
        return MODELS[name](shape, 10, **SMALL.get(name, {})).double()


def inputs(name: str, *lead: int) -> Tensor:
    if name == "char-lstm":
        return rng.bits(1, *lead, *TEXT) % 10
    return rng.normal(1, *lead, *DIGITS, dtype=torch.float64)


def test_the_groups_of_these_tests_cover_the_table() -> None:
    assert sorted([*FLAT, *IMAGES, "char-lstm"]) == sorted(MODELS)


@pytest.mark.parametrize(
    ("name", "shape", "classes", "options", "count"),
    [
        ("linear", MNIST, 10, {}, 7_850),
        ("mlp", (30,), 2, {}, 30 * 64 + 64 + 64 * 64 + 64 + 64 * 2 + 2),
        ("2nn", MNIST, 10, {}, 199_210),
        ("lenet-300-100", MNIST, 10, {}, 266_610),
        ("cnn", MNIST, 10, {}, 1_663_370),
        ("cnn", DIGITS, 10, {"channels": [16, 32], "kernel": 3, "hidden": 64}, 160 + 4_640 + 8_256 + 650),
        ("conv-2", CIFAR, 10, {}, 4_300_992 + 650),
        ("conv-4", CIFAR, 10, {}, 2_425_024 + 906),
        ("conv-6", CIFAR, 10, {}, 2_261_184 + 1_418),
        ("conv-2", CIFAR, 10, {"norm": "batch"}, 4_300_992 + 650 + 2 * 128),
        ("resnet", CIFAR, 10, {"norm": "batch"}, 269_722),
        ("resnet-20", CIFAR, 10, {}, 269_722),
        ("resnet-20", CIFAR, 10, {"norm": "none"}, 269_722 - 688),
        ("resnet-8", CIFAR, 10, {}, 75_290),
        ("resnet", CIFAR, 10, {"depth": 56, "norm": "batch"}, 853_018),
        ("residual-mlp", (30,), 2, {}, 30 * 64 + 64 + 8 * (64 * 64 + 64) + 64 * 2 + 2),
        ("residual-mlp", (30,), 2, {"depth": 1, "width": 5, "norm": "layer"}, 150 + 2 * 25 + 3 * 10 + 12),
        (
            "fractal",
            CIFAR,
            10,
            {"channels": [16, 32], "norm": "none"},
            3 * 448 + 4 * 2_320 + 3 * 4_640 + 4 * 9_248 + 330,
        ),
        ("m-cifarnet", CIFAR, 10, {}, 1_291_968 + 2 * 1_088 + 1_930),
        ("m-cifarnet-small", DIGITS, 10, {"norm": "none"}, 144 + 80_640 + 272 + 490),
        ("char-lstm", (80,), 258, {}, 867_090),
    ],
)
def test_the_number_of_parameters_is_exact(
    name: str, shape: tuple[int, ...], classes: int, options: dict[str, object], count: int
) -> None:
    model = MODELS[name](shape, classes, **options)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("name", FLAT)
@pytest.mark.parametrize("shape", [(1,), (64,), (3, 5), DIGITS, (2, 3, 2, 2)])
def test_flat_models_take_any_shape(name: str, shape: tuple[int, ...]) -> None:
    assert MODELS[name](shape, 3)(rng.normal(1, 4, *shape)).shape == (4, 3)


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("shape", [DIGITS, (3, 11, 8), (2, 13, 17), MNIST])
@pytest.mark.parametrize("norm", ["none", "batch", "group", "layer"])
def test_image_models_give_one_row_of_logits_per_image(name: str, shape: tuple[int, ...], norm: str) -> None:
    logits = MODELS[name](shape, 7, norm=norm)(rng.normal(1, 2, *shape))
    assert logits.shape == (2, 7)
    assert bool(torch.isfinite(logits).all())


@pytest.mark.parametrize("name", [n for n in IMAGES if n.startswith(("resnet", "fractal"))])
def test_resnets_and_fractals_take_an_image_of_one_pixel(name: str) -> None:
    assert MODELS[name]((1, 1, 1), 3)(rng.normal(1, 2, 1, 1, 1)).shape == (2, 3)


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_with_weights_is_plain_and_the_last_is_the_head(name: str) -> None:
    model = small(name)
    plain = (nn.Conv2d, nn.Linear, nn.Embedding, nn.LSTM, nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm)
    owners = {path.rpartition(".")[0] for path, _ in model.named_parameters()}
    assert all(type(model.get_submodule(path)) in plain for path in owners)
    assert list(model.named_children())[-1][0] == "head"
    assert not any(path.split(".")[-1].isdigit() for path in owners)


@pytest.mark.parametrize("name", MODELS)
def test_a_key_decides_the_first_weights(name: str) -> None:
    one, again, other = (params.of(small(name, key))[0] for key in (1, 1, 2))
    assert params.same_bits(one, again)
    assert not params.same_bits(one, other)


@pytest.mark.parametrize("name", MODELS)
def test_a_factory_takes_two_context_names_and_the_rest_by_keyword_with_defaults(name: str) -> None:
    shape, classes, *options = inspect.signature(MODELS[name]).parameters.values()
    assert (shape.name, classes.name) == ("input_shape", "num_classes")
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in options)
    first_line = (inspect.getdoc(MODELS[name]) or "").splitlines()[0]
    assert first_line.endswith(".")


def _loss(model: nn.Module) -> Callable[[params.Params, params.Params, Tensor, Tensor], tuple[Tensor, params.Params]]:
    """Mean cross entropy of labels that differ from row to row, and the buffers after the step."""

    def loss(p: params.Params, b: params.Params, key: Tensor, x: Tensor) -> tuple[Tensor, params.Params]:
        buffers = {name: tensor.clone() for name, tensor in b.items()}
        logits = functional_call(model, {**p, **buffers, **step_keys(key_names(model), key)}, (x,))
        logits = logits.reshape(-1, 10)
        return F.cross_entropy(logits, torch.arange(len(logits)) % 10), buffers

    return loss


@pytest.mark.parametrize("name", MODELS)
def test_gradients_under_functional_call_equal_backward_in_the_module(name: str) -> None:
    model, other = small(name, 1), small(name, 2)
    (trainable, buffers), x, key = params.of(model), inputs(name, 5), rng.as_tensor(3)
    grads, (value, _) = grad_and_value(_loss(other), has_aux=True)(trainable, buffers, key, x)
    for buffer, tensor in step_keys(key_names(model), key).items():
        model.get_buffer(buffer).copy_(tensor)
    logits = model(x).reshape(-1, 10)
    expected = F.cross_entropy(logits, torch.arange(len(logits)) % 10)
    expected.backward()
    torch.testing.assert_close(value, expected.detach(), rtol=1e-10, atol=0)
    assert params.all_finite(grads)
    for path, parameter in model.named_parameters():
        torch.testing.assert_close(grads[path], parameter.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", STACKABLE)
def test_stacked_clients_under_vmap_equal_a_loop_over_them(name: str) -> None:
    """Training mode: gradients, losses, dropout by key, and batch norm's running statistics."""
    model = small(name)
    copies = [params.of(small(name, key)) for key in (1, 2, 3)]
    stacked, held = params.stack([p for p, _ in copies]), params.stack([b for _, b in copies])
    before = {path: tensor.clone() for path, tensor in held.items()}
    x, keys = inputs(name, 3, 4), torch.tensor([5, -6, 2**60])
    step = grad_and_value(_loss(model), has_aux=True)
    grads, (values, buffers) = vmap(step)(stacked, held, keys, x)
    for c, (p, b) in enumerate(copies):
        grads_c, (value_c, buffers_c) = step(p, b, keys[c], x[c])
        torch.testing.assert_close(values[c], value_c, rtol=1e-10, atol=0)
        torch.testing.assert_close({n: t[c] for n, t in grads.items()}, grads_c, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close({n: t[c] for n, t in buffers.items()}, buffers_c, rtol=1e-10, atol=0)
    assert params.same_bits(before, held)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_passes_the_check_and_is_not_changed_by_it(name: str) -> None:
    model = small(name).eval()
    (trainable, buffers), state = params.of(model), torch.get_rng_state()
    shape = TEXT if name == "char-lstm" else DIGITS
    assert check_model(model, shape, 10, inputs(name, 1)[0], name=name) == ""
    assert params.same_bits(trainable, params.of(model)[0])
    assert params.same_bits(buffers, params.of(model)[1])
    assert not any(m.training or m._forward_hooks for m in model.modules())
    assert torch.equal(state, torch.get_rng_state())


class Custom(nn.Module):
    """A user's model whose forward pass is given."""

    def __init__(self, forward: Callable[["Custom", Tensor], object]) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.drop = nn.Dropout(0.5)
        self.given = forward

    def forward(self, x: Tensor) -> object:
        return self.given(self, x)


def check(model: nn.Module, example: Tensor | None = None) -> str:
    return check_model(model, (4,), 3, torch.ones(4) if example is None else example, name="my:Net")


def test_the_check_says_where_a_model_draws_from_torchs_generator() -> None:
    model = Custom(lambda m, x: m.drop(m.fc(x)))
    state = torch.get_rng_state()
    assert check(model) == "drop (Dropout)"
    model.given = lambda m, x: m.fc(x)  # it still has a dropout layer
    assert check(model) == ""
    assert replace_dropout(model) == ("drop",)
    model.given = lambda m, x: m.drop(m.fc(x))
    assert check(model) == ""
    model.given = lambda m, x: F.dropout(m.fc(x), 0.5, m.training)
    assert check(model) == "in its forward code"
    assert torch.equal(state, torch.get_rng_state())


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1, 5, num_layers=2, dropout=0.5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x[..., None])[0][:, -1])


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(1, 4)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.5, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.up(x[..., None]))[:, -1])


@pytest.mark.parametrize(
    ("model", "where", "keyed"),
    [
        (Recurrent, "lstm (LSTM)", ()),
        (
            Attending,
            "encoder.self_attn (MultiheadAttention)",
            ("encoder.dropout", "encoder.dropout1", "encoder.dropout2"),
        ),
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.RReLU()), "1 (RReLU)", ()),
    ],
)
def test_layers_of_torch_that_no_keyed_layer_replaces_may_draw_in_training(
    model: Callable[[], nn.Module], where: str, keyed: tuple[str, ...]
) -> None:
    with rng.torch_seeded(1):
        made = model()
    assert replace_dropout(made) == keyed
    assert check(made) == where


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda m, x: m.fc(x)[:, :2], r"must return .* \(2, 3\) for inputs \(2, 4\), returned shape \(2, 2\)"),
        (lambda m, x: m.fc(x)[0], r"returned shape \(3,\)"),
        (lambda m, x: m.fc(x)[:, None].expand(2, 4, 3), r"returned shape \(2, 4, 3\)"),
        (lambda m, x: (m.fc(x), x), "returned tuple"),
        (lambda m, x: m.fc(x) / 0, "returned NaN or infinite values"),
        (lambda m, x: m.fc(x[:, 1:]), r"failed on inputs of shape \(2, 4\), torch.float32: mat1"),
    ],
)
def test_a_custom_model_that_cannot_be_trained_is_refused(
    forward: Callable[[Custom, Tensor], object], message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"model.name: my:Net .*{message}"):
        check(Custom(forward))


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.fc(x) + (0 if m.training else torch.rand(2, 3)),
        lambda m, x: F.dropout(m.fc(x), 0.5),  # the slip: it drops in evaluation, too
    ],
)
def test_a_model_that_draws_in_evaluation_mode_is_refused(forward: Callable[[Custom, Tensor], object]) -> None:
    model, state = Custom(forward), torch.get_rng_state()
    rule = r"draws from torch's global generator in evaluation mode, .*as F\.dropout\(x, p, training=self\.training\)"
    with pytest.raises(ConfigError, match=rule):
        check(model)
    assert torch.equal(state, torch.get_rng_state())


def draws_with_numpy(m: Custom, x: Tensor) -> Tensor:
    return m.fc(x) * (float(np.random.rand()) if m.training else 1)


def draws_with_python(m: Custom, x: Tensor) -> Tensor:
    return m.fc(x) * (random.random() if m.training else 1)


def draws_with_a_generator_of_its_own(m: Custom, x: Tensor) -> Tensor:
    if not hasattr(m, "own"):
        m.own = torch.Generator()
    return m.fc(x) * torch.rand(3, generator=m.own)


def draws_once_and_keeps_it(m: Custom, x: Tensor) -> Tensor:
    if m.training and not hasattr(m, "mask"):
        m.mask = torch.rand(3)
    return m.fc(x) * m.mask if m.training else m.fc(x)


def draws_with_what_the_first_call_drew(m: Custom, x: Tensor) -> Tensor:
    if not m.training:
        return m.fc(x)
    last, m.scale = getattr(m, "scale", 1), torch.rand(3)
    return m.fc(x) * last


@pytest.mark.parametrize(
    ("forward", "modes"),
    [
        (draws_with_numpy, "training mode"),
        (draws_with_python, "training mode"),
        (draws_with_a_generator_of_its_own, "training and evaluation mode"),
        (draws_with_what_the_first_call_drew, "training mode"),
    ],
)
def test_randomness_that_cannot_be_seeded_is_refused(forward: Callable[[Custom, Tensor], object], modes: str) -> None:
    rule = (
        rf"my:Net returns or draws something else when called again with the same .* and seed \({modes}\)\. .* "
        r"randomness of numpy, Python's random or a generator of its own cannot be keyed"
    )
    with pytest.raises(ConfigError, match=rule):
        check(Custom(forward))


def test_a_draw_that_is_kept_from_the_first_call_on_is_refused_though_both_calls_return_the_same() -> None:
    """Else the first client to be trained, whichever that is in a process, would draw it for all."""
    model = Custom(draws_once_and_keeps_it)
    with pytest.raises(ConfigError, match=r"returns or draws something else .* \(training mode\)"):
        check(model)
    model(torch.ones(2, 4))
    assert check(model) == ""  # nothing is drawn any more


def test_a_keyed_layer_called_twice_is_refused() -> None:
    model = Custom(lambda m, x: m.drop(m.fc(m.drop(x))))
    model.drop = Dropout(0.5)
    with pytest.raises(ConfigError, match="my:Net calls drop more than once in a forward pass"):
        check(model)


def test_a_model_of_tokens_may_give_logits_per_position() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(9, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.embedding(x)

    check(Tokens(), torch.tensor([1, 2, 8, 0]))
    with pytest.raises(ConfigError, match=r"my:Net failed on inputs .* torch\.int64: index out of range"):
        check(Tokens(), torch.tensor([1, 2, 9, 0]))


def test_a_model_without_trainable_or_with_integer_parameters_is_refused() -> None:
    with pytest.raises(ConfigError, match="my:Net has no trainable parameters"):
        check(nn.Identity())
    with pytest.raises(ConfigError, match="my:Net has no trainable parameters"):
        check(nn.Linear(4, 3).requires_grad_(False))
    model = nn.Linear(4, 3)
    model.register_parameter("steps", nn.Parameter(torch.tensor(1), requires_grad=False))
    with pytest.raises(ConfigError, match=r"my:Net: parameters must be floating, steps is torch\.int64"):
        check(model)
    lazy = nn.LazyLinear(3)
    with pytest.raises(ConfigError, match="my:Net: parameters need a shape, weight gets it in the first call only"):
        check(lazy)


class Remembering(nn.Module):
    """A user's model with a buffer of each kind and a plain attribute."""

    def __init__(self, forward: Callable[["Remembering", Tensor], Tensor]) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.register_buffer("ema", torch.zeros(3))
        self.register_buffer("last", torch.zeros(3), persistent=False)
        self.calls = 0
        self.given = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.given(self, self.fc(x))


def lerps(m: Remembering, y: Tensor) -> Tensor:
    if m.training:
        m.ema.lerp_(y.detach().mean(0), 0.5)
    return y - m.ema


def assigns(m: Remembering, y: Tensor) -> Tensor:
    if m.training:
        m.ema = m.ema + y.detach().mean(0)
    return y


def counts(m: Remembering, y: Tensor) -> Tensor:
    m.calls += m.training
    return y / m.calls if m.training else y


def warms_up_by_evaluations(m: Remembering, y: Tensor) -> Tensor:
    m.calls += not m.training
    return y if m.training else y + m.calls


def starts_from_its_first_batch(m: Remembering, y: Tensor) -> Tensor:
    m.calls += 1
    return y - y.mean(0) if m.calls == 1 else y


def keeps(m: Remembering, y: Tensor) -> Tensor:
    m.last.copy_(y.detach().sum(0))
    return y


def replaces(m: Remembering, y: Tensor) -> Tensor:
    m.last = y.detach().sum(0)
    return y


def follows_in_evaluation(m: Remembering, y: Tensor) -> Tensor:
    m.ema += 1
    return y


def clips_its_weights(m: Remembering, y: Tensor) -> Tensor:
    with torch.no_grad():
        m.fc.weight.clamp_(-0.01, 0.01)
    return y


def test_a_model_may_remember_in_persistent_buffers_updated_in_place() -> None:
    model = Remembering(lerps)
    check(model)
    assert not model.ema.any()


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (assigns, r"assigns a new tensor to buffer ema .* update buffers in place, with copy_ or lerp_"),
        (counts, r"returns or draws something else when called again .* \(training mode\)\. .* from client to client"),
        (warms_up_by_evaluations, r"returns or draws something else .* \(evaluation mode\)"),
        (starts_from_its_first_batch, r"returns or draws something else .* \(training mode\)"),
        (keeps, r"changes buffer last in its forward pass, which is not persistent: .* persistent=True"),
        (replaces, r"changes buffer last in its forward pass, which is not persistent"),
        (follows_in_evaluation, r"changes buffers in evaluation mode; only training may"),
        (clips_its_weights, r"changes its own parameters in its forward pass"),
    ],
)
def test_a_model_that_remembers_in_any_other_way_is_refused(
    forward: Callable[[Remembering, Tensor], Tensor], message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"model.name: my:Net {message}"):
        check(Remembering(forward))


def test_a_model_that_returns_something_else_in_training_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"my:Net must return a tensor of shape \(2, 3\) .*, returned tuple"):
        check(Custom(lambda m, x: (m.fc(x), x) if m.training else m.fc(x)))


def test_batch_norm_over_one_number_cannot_be_trained_on_a_single_example() -> None:
    check_single(nn.Linear(4, 3), (4,), 3, torch.ones(4), name="my:Net")
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    check(model)
    with pytest.raises(
        ConfigError, match=r"my:Net failed on inputs of shape \(1, 4\), .* more than 1 value per channel"
    ):
        check_single(model, (4,), 3, torch.ones(4), name="my:Net")
    assert int(model[1].num_batches_tracked) == 0
    squeezed = Custom(lambda m, x: m.fc(x).squeeze())
    with pytest.raises(ConfigError, match=r"must return a tensor of shape \(1, 3\) .*, returned shape \(3,\)"):
        check_single(squeezed, (4,), 3, torch.ones(4), name="my:Net")
