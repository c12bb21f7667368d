import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call

from fedsim import params as p
from fedsim import rng
from fedsim.models.layers.keyed import key_names, progress_names, step_keys
from fedsim.models.layers.variational import log_alphas
from fedsim.models.layers.weights import StochasticConv2d, StochasticLinear
from fedsim.models.zoo import MODELS
from fedsim.training import regularizers as r
from fedsim.training.objective import PLAIN, Start


def build(name: str, shape: tuple[int, ...] = (1, 8, 8), **keys: Any) -> nn.Module:
    with rng.torch_seeded(3):
        return MODELS[name](input_shape=shape, num_classes=3, **keys)


def cnn(norm: str = "none") -> nn.Module:
    return build("cnn", channels=[4, 6], kernel=3, hidden=8, norm=norm)


def noisy(model: nn.Module) -> list[str]:
    return [path for path, m in model.named_modules() if isinstance(m, StochasticLinear | StochasticConv2d)]


PLACES = [
    (r.dropconnect(), ["fc1"]),
    (r.dropconnect(masks="example"), ["fc1"]),
    (r.targeted_dropout(), ["conv1", "conv2", "fc1"]),
    (r.targeted_dropout(where="hidden"), ["fc1"]),
    (r.variational_dropout(), ["fc1"]),
    (r.variational_dropout(where="convolutions"), ["conv1", "conv2"]),
    (r.variational_dropout(kind="sparse", where="all"), ["conv1", "conv2", "fc1"]),
]


@pytest.mark.parametrize(("regularizer", "paths"), PLACES)
def test_it_works_on_these_layers_never_on_the_head(regularizer: r.Regularizer, paths: list[str]) -> None:
    model = cnn()
    names = [*p.of(model)[0]]
    regularizer.bind(model, PLAIN)
    assert noisy(model) == paths
    assert [name for name in p.of(model)[0] if not name.rpartition(".")[2].startswith("log_")] == names


NOWHERE = [
    (r.dropconnect(), "linear", {}, "needs hidden linear layers; mlp, 2nn"),
    (r.dropconnect(), "resnet", {"depth": 8}, "needs hidden linear layers; mlp, 2nn"),
    (
        r.targeted_dropout(),
        "linear",
        {},
        "needs hidden linear layers or convolutions; every model but linear and char-lstm",
    ),
    (r.targeted_dropout(where="convolutions"), "mlp", {}, "needs convolutions; cnn, conv-2, .* resnet have them"),
    (r.variational_dropout(), "resnet", {"depth": 8}, "needs hidden linear layers that are trained; mlp, 2nn"),
]


@pytest.mark.parametrize(("regularizer", "name", "keys", "message"), NOWHERE)
def test_a_model_without_a_place_is_refused(
    regularizer: r.Regularizer, name: str, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        regularizer.bind(build(name, **keys), PLAIN)


def test_a_residual_net_and_no_recurrent_one_has_weights_to_target() -> None:
    model = build("resnet", depth=8)
    r.targeted_dropout().bind(model, PLAIN)
    assert len(noisy(model)) == 7
    with pytest.raises(ValueError, match="needs hidden linear layers or convolutions"):
        r.targeted_dropout().bind(MODELS["char-lstm"](input_shape=(5,), num_classes=7), PLAIN)


def test_a_layer_of_somebody_elses_class_is_left_alone() -> None:
    class Mine(nn.Linear):
        pass

    model = nn.Sequential(Mine(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2))
    r.dropconnect().bind(model, PLAIN)
    assert noisy(model) == ["2"] and type(model[0]) is Mine


@pytest.mark.parametrize("masks", ["batch", "example"])
def test_moments_evaluate_each_unit_by_its_mean_behind_relu(masks: Any) -> None:
    """Each layer's unit by scipy's normal distribution, layer after layer."""
    from scipy.stats import norm

    model, x = build("mlp", hidden=[9, 7]), rng.normal(1, 4, 1, 8, 8)
    state = {name: tensor.double().numpy() for name, tensor in p.of(model)[0].items()}
    r.dropconnect(p=0.3, masks=masks, inference="moments").bind(model, PLAIN)
    values = x.flatten(1).double().numpy()
    for layer in ("fc1", "fc2"):
        weight, bias = state[f"{layer}.weight"], state[f"{layer}.bias"]
        mean, deviation = values @ weight.T + bias, (0.3 / 0.7 * values**2 @ weight.T**2) ** 0.5
        values = mean * norm.cdf(mean / deviation) + deviation * norm.pdf(mean / deviation)
    expected = values @ state["head.weight"].T + state["head.bias"]
    found = model.eval()(x).double()
    assert torch.allclose(found, torch.tensor(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)),
        nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.ReLU(), nn.Linear(5, 2)),
        nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.Linear(5, 2)),
    ],
)
def test_moments_need_a_relu_right_behind(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"inference: moments needs an nn\.ReLU right behind each hidden layer"):
        r.dropconnect(inference="moments").bind(model, PLAIN)
    assert noisy(model) == []
    with pytest.raises(ValueError, match="moments needs"):
        r.bind(build("mlp", hidden=[5]), [r.dropconnect(inference="moments"), r.maxout()])


def test_moments_take_an_identity_for_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Identity(), nn.ReLU(), nn.Linear(5, 2))
    r.dropconnect(inference="moments").bind(model, PLAIN)
    assert noisy(model) == ["0"]


@pytest.mark.parametrize("options", [{"masks": "example"}, {"inference": "moments"}])
def test_two_laws_on_one_layer_are_refused_by_name(options: dict[str, Any]) -> None:
    one, other = r.dropconnect(**options), r.variational_dropout()
    for both in ([one, other], [other, one]):
        with pytest.raises(ValueError, match=r"(dropconnect and var.*|variational-dropout and drop.*) both say"):
            r.bind(cnn(), both)


def test_three_on_one_layer_work_one_after_the_other() -> None:
    """Masks of dropconnect and targeted dropout on the weight first, then the noise of what is left."""
    model, x = build("mlp", hidden=[9]), rng.normal(1, 4, 1, 8, 8)
    weight, bias = (t.clone() for n, t in p.of(model)[0].items() if n.startswith("fc1"))
    r.bind(model, [r.targeted_dropout(ramp=False), r.dropconnect(p=0.3), r.variational_dropout(p=0.2)])
    keys = step_keys(key_names(model), 5)
    assert [*keys] == [f"fc1.{path}.key" for path in ("noises.targeted_dropout", "noises.dropconnect", "law")]
    found = functional_call(model, keys, (x,))
    layer = model.get_submodule("fc1")
    left = weight
    for noise in layer.noises:  # type: ignore[union-attr]
        name = next(n for n, m in layer.noises.named_children() if m is noise)  # type: ignore[union-attr]
        left = functional_call(noise, {"key": keys[f"fc1.noises.{name}.key"]}, (left,))
    rows = x.flatten(1)
    noise = rng.noise(keys["fc1.law.key"], 4, 9)
    hidden = rows @ left.T + bias + (0.25 * rows**2 @ left.T**2 + 1e-8).sqrt() * noise
    head = model.get_submodule("head")
    assert torch.allclose(found, head(hidden.relu()), rtol=1e-4, atol=1e-5)
    assert 0.4 < (left == 0).float().mean() < 0.6  # 1 - 0.75 * 0.7


@pytest.mark.parametrize(("share", "shape"), [("auto", ()), ("layer", ()), ("unit", (8,)), ("weight", (8 * 24,))])
def test_log_alpha_starts_from_the_rate_of_dropout(share: Any, shape: tuple[int, ...]) -> None:
    model = cnn()
    objective = r.variational_dropout(p=0.3, share=share).bind(model, PLAIN)
    log_alpha = p.of(model)[0]["fc1.log_alpha"]
    assert log_alpha.shape == shape and log_alpha.dtype == torch.float32
    assert torch.allclose(log_alpha.exp(), torch.tensor(0.3 / 0.7))
    assert objective.told()[1:] == ["fedsim.training.variational.gaussian"]


def test_sparse_starts_with_one_alpha_for_all() -> None:
    model = cnn().double()
    objective = r.variational_dropout(p=0.3, kind="sparse").bind(model, PLAIN)
    params = p.of(model)[0]
    alphas = log_alphas(params["fc1.weight"], params["fc1.log_sigma2"]).exp()
    assert torch.allclose(alphas, torch.full_like(alphas, 0.3 / 0.7))
    assert objective.told()[1:] == ["fedsim.training.variational.sparse"]


def test_without_a_strength_there_is_noise_and_no_divergence() -> None:
    model = cnn()
    assert r.variational_dropout(strength=0.0).bind(model, PLAIN) == PLAIN
    assert noisy(model) == ["fc1"]


def test_what_a_kind_cannot_have_is_refused() -> None:
    with pytest.raises(ValueError, match=r"p must be at most 0.5 with kind: gaussian, .* got 0.6"):
        r.variational_dropout(p=0.6)
    assert r.variational_dropout(p=0.6, kind="sparse").stage == "weights"
    with pytest.raises(ValueError, match="share must be weight with kind: sparse, got 'unit'"):
        r.variational_dropout(kind="sparse", share="unit")


def test_frozen_layers_have_no_posterior() -> None:
    model = build("mlp", hidden=[9, 7])
    model.get_submodule("fc1").requires_grad_(False)
    r.variational_dropout().bind(model, PLAIN)
    assert noisy(model) == ["fc2"]
    model.get_submodule("fc2").requires_grad_(False)
    frozen = build("mlp", hidden=[9])
    frozen.get_submodule("fc1").requires_grad_(False)
    with pytest.raises(ValueError, match="needs hidden linear layers that are trained"):
        r.variational_dropout().bind(frozen, PLAIN)


def test_penalties_on_weights_leave_what_was_added_alone() -> None:
    """What counts as a weight has two axes or more; the new parameters have one at most."""
    for options in ({"share": "weight"}, {"share": "unit"}, {"kind": "sparse"}):
        model = cnn()
        plain = r.l2(strength=1.0).bind(model, PLAIN).penalties[0](p.of(model)[0], Start({}, 1))
        r.variational_dropout(**options).bind(model, PLAIN)  # type: ignore[arg-type]
        params = p.of(model)[0]
        assert r.l2(strength=1.0).bind(model, PLAIN).penalties[0](params, Start({}, 1)) == plain


def test_only_the_ramped_layers_are_told_the_progress() -> None:
    model = cnn()
    r.bind(model, [r.targeted_dropout(), r.dropconnect(), r.variational_dropout()])
    assert progress_names(model) == tuple(
        f"{one}.noises.targeted_dropout.progress" for one in ("conv1", "conv2", "fc1")
    )


def test_in_evaluation_the_model_is_the_plain_one_bit_for_bit() -> None:
    model = cnn("group")
    plain, x = copy.deepcopy(model).eval(), rng.normal(1, 5, 1, 8, 8)
    r.bind(model, [r.targeted_dropout(), r.dropconnect(), r.variational_dropout()])
    assert torch.equal(model.eval()(x), plain(x))
