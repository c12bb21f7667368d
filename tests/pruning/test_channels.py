import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, CLASSES, MODELS, TRIALS
from hypothesis import given, settings
from hypothesis import strategies as st
from smaller import SHAPE, check_equal, inputs, scrambled, some, state_of
from torch import Tensor, nn
from torch.func import functional_call

from fedsim import params as p
from fedsim import rng
from fedsim.models import zoo
from fedsim.models.fixup import fixup
from fedsim.models.layers.attaching import attach
from fedsim.models.layers.dropouts import Dropout
from fedsim.pruning.channels import Consumer, Group, groups, indices, masked, refusals, shrunk, sliced
from fedsim.training.regularizers import REGULARIZERS, bind


def built(name: str, dtype: torch.dtype = torch.float64, shape=SHAPE, **keys) -> nn.Module:
    """A model with numbers of both signs wherever it can have them, and statistics that are not those of the start."""
    with rng.torch_seeded(5):
        model = zoo.MODELS[name](input_shape=shape, num_classes=CLASSES, **keys)
    return scrambled(model.to(dtype))


# ---------------------------------------------------------------- what is found


def test_convolutions_own_pixels_of_the_next_linear_layer_and_their_norms() -> None:
    found = groups(built("cnn", channels=[4, 6], kernel=3, hidden=10, norm="batch"), SHAPE)
    assert found == [
        Group("conv1", 4, ("norm1",), (Consumer("conv2", 1),)),
        Group("conv2", 6, ("norm2",), (Consumer("fc1", 4),)),
        Group("fc1", 10, (), (Consumer("head", 1),)),
    ]


@pytest.mark.parametrize(("name", "widths"), [("2nn", [200, 200]), ("lenet-300-100", [300, 100]), ("mlp", [64, 64])])
@pytest.mark.parametrize("norm", ["none", "batch", "group", "layer"])
def test_hidden_units_of_perceptrons_are_found(name: str, widths: list[int], norm: str) -> None:
    found = groups(built(name, norm=norm), SHAPE)
    follows = [(f"fc_norm{i}",) if norm != "none" else () for i in (1, 2)]
    assert [(group.layer, group.out, group.follows, group.next) for group in found] == [
        ("fc1", widths[0], follows[0], (Consumer("fc2", 1),)),
        ("fc2", widths[1], follows[1], (Consumer("head", 1),)),
    ]


@pytest.mark.parametrize("name", ["conv-2", "conv-4", "conv-6"])
@pytest.mark.parametrize("norm", ["none", "batch", "group", "layer"])
def test_the_stacks_of_the_lottery_ticket_paper_are_found(name: str, norm: str) -> None:
    found = groups(built(name, norm=norm), SHAPE)
    convolutions = int(name[-1])
    assert [group.layer for group in found] == [*(f"conv{i + 1}" for i in range(convolutions)), "fc1", "fc2"]
    pixels = (8 // 2 ** (convolutions // 2)) ** 2
    assert found[convolutions - 1].next == (Consumer("fc1", pixels),)
    assert all(group.multiple == (max(1, group.out // 8) if norm == "group" else 1) for group in found[:convolutions])


@pytest.mark.parametrize(("norm", "init"), [("none", ""), ("none", "fixup"), ("batch", ""), ("group", "")])
def test_only_inner_convolutions_of_residual_blocks_are_found(norm: str, init: str) -> None:
    model = built("resnet", depth=14, norm=norm)
    if init:
        fixup(model)
    blocks = [f"stage{stage}.block{i}" for stage in (1, 2, 3) for i in (1, 2)]
    follows = {block: (f"{block}.norm1",) if norm != "none" else () for block in blocks}
    found = groups(model, SHAPE)
    assert [group.layer for group in found] == [f"{block}.conv1" for block in blocks]
    assert [(group.follows, group.next) for group in found] == [
        (follows[block], (Consumer(f"{block}.conv2", 1),)) for block in blocks
    ]
    assert [group.out for group in found] == [16, 16, 32, 32, 64, 64]
    reasons = refusals(model, SHAPE)
    assert list(reasons) == ["conv1", *(f"{block}.conv2" for block in blocks), "head"]
    assert reasons["stage2.block1.conv2"].startswith("its channels meet those of conv1 before ")
    assert reasons["head"] == "its outputs are the model's"


def test_inner_layers_of_a_residual_perceptron_are_found() -> None:
    found = groups(built("residual-mlp", depth=2, width=9, norm="batch"), SHAPE)
    assert found == [
        Group(f"stage1.block{i}.fc1", 9, (f"stage1.block{i}.norm1",), (Consumer(f"stage1.block{i}.fc2", 1),))
        for i in (1, 2)
    ]


@pytest.mark.parametrize(("name", "shape"), [("linear", SHAPE), ("char-lstm", (5,))])
def test_a_model_without_removable_channels_is_an_error_that_says_why(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^no channels of this model can be removed \(head: its outputs are the mod"):
        groups(built(name, torch.float32, shape), shape)


# ---------------------------------------------------------------- the smaller model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("cnn", {"channels": [5, 7], "kernel": 3, "hidden": 11}),
        ("conv-4", {}),
        ("2nn", {}),
        ("resnet-8", {}),
        ("residual-mlp", {"depth": 2, "width": 9}),
        ("fractal", {"channels": [4, 6], "columns": 2}),
    ],
)
def test_the_small_model_computes_what_the_masked_one_does(name: str, keys, norm: str, dtype: torch.dtype) -> None:
    model = built(name, dtype, norm=norm, **keys)
    check_equal(model, some(groups(model, SHAPE)))


@pytest.mark.parametrize("name", ["resnet-8", "residual-mlp"])
def test_the_small_model_with_fixup_computes_what_the_masked_one_does(name: str) -> None:
    model = built(name, norm="none")
    fixup(model)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):  # which fixup has set to 0
            parameter.add_(rng.normal(i, *parameter.shape).to(parameter) * 0.2)
    check_equal(model, some(groups(model, SHAPE)))


def over_what_stays(norm: nn.Module, staying: Tensor, x: Tensor) -> Tensor:
    """Group and layer norm of ``x``, whose statistics are of ``staying`` channels, in as many groups; the others 0."""
    y = torch.zeros_like(x)
    count = getattr(norm, "num_groups", 1)
    for row in range(len(x)):
        for members in staying.reshape(count, -1):
            part = x[row, members]
            variance = ((part - part.mean()) ** 2).mean()
            scaled = (part - part.mean()) / torch.sqrt(variance + norm.eps)
            shape = (-1, *[1] * (part.dim() - 1))
            y[row, members] = scaled * norm.weight[members].view(shape) + norm.bias[members].view(shape)
    return y


@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize("name", ["conv-2", "2nn", "resnet-8"])
def test_pooling_norms_take_their_statistics_over_what_stays(name: str, norm: str) -> None:
    model = built(name, norm=norm).eval()
    found, x = groups(model, SHAPE), inputs(3)
    kept = some(found)
    small = shrunk(model, kept, SHAPE)
    reference = copy.deepcopy(model)
    reference.load_state_dict(masked(state_of(model), kept, found))
    for group in found:
        for path in group.follows:
            module = reference.get_submodule(path)
            module.forward = partial(over_what_stays, module, indices(kept[group.layer], group))
    torch.testing.assert_close(small(x), reference(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("name", ["cnn", "resnet-8"])
def test_both_stay_equal_when_they_are_trained(name: str, norm: str) -> None:
    model = built(name, norm=norm).train()
    found, x, labels = groups(model, SHAPE), inputs(6), torch.tensor([0, 2, 1, 1, 0, 2])
    kept = some(found)
    small, large = shrunk(model, kept, SHAPE), copy.deepcopy(model)
    large.load_state_dict(masked(state_of(model), kept, found))
    for one in (small, large):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.05, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(one(x), labels).backward()
            optimizer.step()
    trained, start = p.of(large)[0], p.of(model)[0]
    first = masked(start, kept, found)
    assert all(not torch.equal(trained[name], first[name]) for name in trained if name.endswith("weight"))
    torch.testing.assert_close(masked(trained, kept, found), trained, rtol=0, atol=0)  # what is gone stays so
    torch.testing.assert_close(p.of(small)[0], sliced(trained, kept, found), rtol=1e-9, atol=1e-10)
    statistics = sliced(p.of(large)[1], kept, found)
    torch.testing.assert_close(p.of(small)[1], statistics, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("name", "model_name"), TRIALS)
def test_models_with_any_regulariser_are_made_smaller_or_refused_by_layer(name: str, model_name: str) -> None:
    spec = MODELS[model_name]
    model = spec.build()
    with rng.torch_seeded(4):
        bind(model, [REGULARIZERS[name](**CASES[name].options)])
    if spec.tokens:
        with pytest.raises(ValueError, match="no channels of this model can be removed"):
            groups(model, spec.shape)
        return
    if name == "maxout" and model_name == "mlp":
        assert set(refusals(model, spec.shape)) == {"fc1", "fc2", "head"}
        return
    scrambled(model)
    found = groups(model, spec.shape)
    kept = some(found)
    norms = [model.get_submodule(path) for group in found for path in group.follows]
    if any(isinstance(norm, nn.GroupNorm) for norm in norms):
        small = shrunk(model, kept, spec.shape)  # which is another function
    else:
        small = check_equal(model, kept, spec.shape, spec.batch(4).inputs)
    assert [type(module) for module in small.modules()] == [type(module) for module in model.modules()]
    x = spec.batch(4).inputs
    assert small.train()(x).shape == model.train()(x).shape
    small(x).sum().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())


def test_tensors_in_a_shape_of_their_own_are_refused_with_who_is_read_by_their_layer() -> None:
    model = MODELS["mlp"].build()
    bind(model, [REGULARIZERS["variational-dropout"](p=0.3, share="weight")])
    why = refusals(model, (2, 3))
    assert why["fc2"] == "fc2 has log_alpha in a shape of its own, (63,)"
    assert why["fc1"] == "fc1 has log_alpha in a shape of its own, (54,)"


def test_several_heads_all_read_what_is_left() -> None:
    model = MODELS["mlp"].build()
    with rng.torch_seeded(4):
        bind(model, [REGULARIZERS["ensemblenet"](heads=3)])
    found = groups(model, (2, 3))
    readers = {one.path for group in found for one in group.next}
    assert {path for path in readers if "forks" in path}
    small = shrunk(model, {found[0].layer: torch.tensor([0, 4])}, (2, 3))
    assert small.train()(inputs(4, (2, 3))).shape == (4, 3, CLASSES)


def test_sizes_flags_and_hooks_are_right_and_the_model_stays() -> None:
    model = built("cnn", channels=[4, 6], kernel=3, hidden=10, norm="batch")
    attach(model.get_submodule("relu1"), "dropout", Dropout(0.3))
    model.get_submodule("conv2").weight.requires_grad_(False)
    before, kept = p.of(model), {"conv1": torch.tensor([0, 2, 3]), "conv2": torch.tensor([1, 5])}
    small = shrunk(model.train(), kept, SHAPE)
    assert all(p.same_bits(now, then) for now, then in zip(p.of(model), before, strict=True))
    assert small.training
    assert (small.conv1.in_channels, small.conv1.out_channels, small.norm1.num_features) == (2, 3, 3)
    assert (small.conv2.in_channels, small.conv2.out_channels, small.norm2.num_features) == (3, 2, 2)
    assert (small.fc1.in_features, small.fc1.out_features, small.head.in_features) == (8, 10, 10)
    assert [name for name, _ in small.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert [q.requires_grad for q in small.parameters()] == [q.requires_grad for q in model.parameters()]
    assert torch.equal(small.norm1.running_var, model.norm1.running_var[[0, 2, 3]])
    assert torch.equal(small.norm2.running_mean, model.norm2.running_mean[[1, 5]])
    assert torch.equal(small.fc1.weight, model.fc1.weight.reshape(10, 6, 4)[:, [1, 5]].reshape(10, 8))
    assert type(small.relu1.dropout) is Dropout
    assert not torch.equal(small(inputs(2)), small.eval()(inputs(2)))


def test_masked_parameters_have_rows_biases_scales_shifts_and_columns_at_0() -> None:
    model = built("cnn", channels=[4, 6], kernel=3, hidden=10, norm="batch")
    state = state_of(model)
    zeroed = masked(state, {"conv2": torch.tensor([0, 1, 2, 4])}, groups(model, SHAPE))
    changed = [name for name in state if not torch.equal(zeroed[name], state[name])]
    norm = [f"norm2.{name}" for name in ("weight", "bias", "running_mean", "running_var")]
    assert changed == ["conv2.weight", "conv2.bias", *norm[:2], "fc1.weight", *norm[2:]]
    for name in changed:
        lost = zeroed[name][[3, 5]] if name != "fc1.weight" else zeroed[name][:, [12, 13, 14, 15, 20, 21, 22, 23]]
        assert not lost.any()
        assert int(zeroed[name].count_nonzero()) == state[name].numel() - lost.numel()


def test_other_tensors_of_the_same_names_are_cut_alike() -> None:
    model = built("mlp", hidden=[5, 4])
    found, kept = groups(model, SHAPE), {"fc1": torch.tensor([True, False, True, True, False])}
    momentum = {name: torch.arange(q.numel()).reshape(q.shape) for name, q in p.of(model)[0].items()}
    small = sliced({**momentum, "lr": torch.tensor([3, 4])}, kept, found)
    assert small["fc1.bias"].tolist() == [0, 2, 3]
    assert small["fc1.weight"][:, 0].tolist() == [0, 2 * 128, 3 * 128]
    assert small["fc2.weight"].tolist() == [[i, i + 2, i + 3] for i in range(0, 20, 5)]
    assert small["fc2.bias"].tolist() == [0, 1, 2, 3]
    assert small["lr"].tolist() == [3, 4]


def test_a_model_that_cannot_be_called_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"^the model cannot be called with an input \(2, 8\): RuntimeError: "):
        groups(built("cnn", channels=[4], kernel=3), (2, 8))


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"conv1": torch.tensor([], dtype=torch.int64)}, "conv1 must keep at least one channel"),
        ({"conv1": torch.zeros(16, dtype=torch.bool)}, "conv1 must keep at least one channel"),
        ({"conv1": torch.tensor([0, 1, 2])}, "conv1 must keep a multiple of 2 channels"),
        ({"conv1": torch.tensor([2, 1])}, "kept channels of conv1 must be int64, ascending in"),
        ({"conv1": torch.tensor([2, 2])}, "kept channels of conv1 must be int64, ascending in"),
        ({"conv1": torch.tensor([2, 16])}, "kept channels of conv1 must be int64, ascending in"),
        ({"conv1": torch.tensor([-1, 3])}, "kept channels of conv1 must be int64, ascending in"),
        ({"conv1": torch.tensor([1.0, 2.0])}, "kept channels of conv1 must be int64, ascending in"),
        ({"conv1": torch.ones(5, dtype=torch.bool)}, "kept channels of conv1 must be int64, ascending in"),
        ({"conv9": torch.tensor([0])}, "channels of conv9 cannot be removed; those of conv1, fc1 can"),
        ({"head": torch.tensor([0])}, "channels of head cannot be removed: its outputs are the model's"),
    ],
)
def test_wrong_choices_are_errors_that_name_the_layer(kept: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        shrunk(built("cnn", channels=[16], kernel=3, hidden=4, norm="group"), kept, SHAPE)


def test_tensors_of_another_model_are_refused() -> None:
    found = groups(built("mlp", hidden=[6]), SHAPE)
    other = p.of(built("mlp", hidden=[5]))[0]
    with pytest.raises(ValueError, match=r"^fc1\.weight: must have 6 entries along an axis, 1 for each channel, got 5"):
        sliced(other, {"fc1": torch.tensor([0])}, found)


@settings(max_examples=15, deadline=None)
@given(
    widths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    hidden=st.integers(1, 9),
    norm=st.sampled_from(["none", "batch"]),
    seed=st.integers(0, 999),
)
def test_any_stack_with_any_channels_left_equals_the_masked_one(widths, hidden, norm, seed) -> None:
    model = built("cnn", channels=widths, kernel=3, hidden=hidden, norm=norm).eval()
    found, x = groups(model, SHAPE), inputs(3)
    kept = {group.layer: (rng.uniform(rng.fold(seed, group.layer), group.out) < 0.5) for group in found}
    kept = {layer: flags if bool(flags.any()) else ~flags for layer, flags in kept.items()}
    expected = functional_call(model, masked(state_of(model), kept, found), (x,))
    torch.testing.assert_close(shrunk(model, kept, SHAPE)(x), expected, rtol=1e-9, atol=1e-10)
