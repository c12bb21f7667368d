import pytest
import torch
import torch.nn.functional as F
from smaller import SHAPE, check_equal, scrambled, some
from torch import Tensor, nn

from fedsim import rng
from fedsim.pruning.channels import Consumer, Group, groups, refusals, shrunk


class Users(nn.Module):
    """A model whose forward pass is somebody's own."""

    def __init__(self, forward, **children: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.steps = forward
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x: Tensor) -> Tensor:
        return self.steps(self, x)


def users(forward, **children) -> nn.Module:
    return scrambled(Users(forward, **children).double())


def convolutions(**more) -> dict[str, nn.Module]:
    """Two convolutions and a head behind 4 x 4 pixels, made anew."""
    with rng.torch_seeded(1):
        made = {"one": nn.Conv2d(2, 5, 3, padding=1), "two": nn.Conv2d(5, 6, 3, padding=1), "head": nn.Linear(96, 3)}
        return {**made, **more}


def ending(model: nn.Module, x: Tensor) -> Tensor:
    return model.head(F.avg_pool2d(x, 2).flatten(1))


def test_activations_that_are_not_0_at_0_and_code_between_layers_are_followed() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x = m.norm(torch.sigmoid(m.one(x)))
        return ending(m, m.act(m.two(torch.cat([x, x], 2)[:, :, :8])))

    model = users(forward, norm=nn.BatchNorm2d(5), act=nn.PReLU(6), **convolutions())
    found = groups(model, SHAPE)
    assert found == [
        Group("one", 5, ("norm",), (Consumer("two", 1),)),
        Group("two", 6, ("act",), (Consumer("head", 16),)),
    ]
    small = check_equal(model, some(found))
    assert small.act.num_parameters == small.two.out_channels


def test_a_parameter_of_the_code_that_is_0_hides_no_reader() -> None:
    gate = nn.Parameter(torch.zeros(()))
    model = users(lambda m, x: ending(m, m.two(torch.relu(m.one(x)) * m.gate)), gate=gate, **convolutions())
    assert [group.next for group in groups(model, SHAPE)] == [(Consumer("two", 1),), (Consumer("head", 16),)]


def test_group_norm_behind_a_flatten_takes_as_many_channels_as_make_whole_groups() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.head(m.norm(torch.relu(m.one(x)).flatten(1)))

    for count, multiple in ((8, 1), (3 * 64, 3), (48, 3), (2, 1)):
        layers = {"one": nn.Conv2d(2, 6, 3, padding=1), "norm": nn.GroupNorm(count, 384), "head": nn.Linear(384, 3)}
        model = users(forward, **layers)
        (group,) = groups(model, SHAPE)
        assert group.multiple == multiple
        small = shrunk(model, {"one": torch.arange(multiple)}, SHAPE)
        assert (small.norm.num_channels, small(torch.zeros(2, *SHAPE).double()).shape) == (64 * multiple, (2, 3))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_activations_that_stop_one_sign_are_followed(sign: float) -> None:
    model = users(lambda m, x: ending(m, torch.relu(sign * m.two(torch.relu(sign * m.one(x))))), **convolutions())
    found = groups(model, SHAPE)
    assert [group.layer for group in found] == ["one", "two"]
    check_equal(model, some(found))


def test_activations_that_write_into_their_input_and_share_one_number_are_followed() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x = m.relu(m.norm(m.one(x)))
        x = m.two(x)
        x *= 2.0
        return ending(m, m.act(m.relu(x + 0.5) - 0.7))

    more = {"norm": nn.BatchNorm2d(5), "relu": nn.ReLU(inplace=True), "act": nn.PReLU()}
    model = users(forward, **convolutions(**more))
    found = groups(model, SHAPE)
    assert [(group.layer, group.follows) for group in found] == [("one", ("norm",)), ("two", ())]
    check_equal(model, some(found))


def test_norms_behind_a_flatten_and_several_readers_are_followed() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x = torch.relu(m.one(x))
        return m.head(m.norm(F.max_pool2d(x, 2).flatten(1))) + m.other(x.mean((2, 3)))

    made = {"one": nn.Conv2d(2, 5, 3, padding=1), "head": nn.Linear(80, 3), "other": nn.Linear(5, 3)}
    model = users(forward, norm=nn.BatchNorm1d(80), **made)
    (found,) = groups(model, SHAPE)
    assert (found.follows, set(found.next)) == (("norm",), {Consumer("head", 16), Consumer("other", 1)})
    small = check_equal(model, {"one": torch.tensor([0, 3])})
    assert small.norm.num_features == 32


def plain(m: nn.Module, x: Tensor) -> Tensor:
    return ending(m, torch.relu(m.two(torch.relu(m.one(x)))))


def tied() -> nn.Module:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.head(m.again(torch.relu(m.two(torch.relu(m.one(x))))).mean((2, 3)))

    layers = {"one": nn.Conv2d(2, 6, 3), "two": nn.Conv2d(6, 6, 3, padding=1), "head": nn.Linear(6, 3)}
    model = users(forward, again=nn.Conv2d(6, 6, 3, padding=1), **layers)
    model.again.weight = model.two.weight
    return model


def counting(m: nn.Module, x: Tensor) -> Tensor:
    """Code that minds only if channels of both go: 5 times 6 are there, or the half of them."""
    product = m.one.out_channels * m.two.out_channels
    return plain(m, x) * (1.0 if product >= 12 else 2.0)


REFUSED = {
    "grouped": (
        lambda: users(plain, **convolutions(two=nn.Conv2d(5, 5, 3, padding=1, groups=5), head=nn.Linear(80, 3))),
        "one",
        "two is a convolution of 5 groups",
    ),
    "twice": (
        lambda: users(
            lambda m, x: ending(m, m.two(torch.relu(m.two(torch.relu(m.one(x)))))),
            **convolutions(one=nn.Conv2d(2, 6, 3, padding=1), two=nn.Conv2d(6, 6, 3, padding=1)),
        ),
        "one",
        "two is called 2 times in a forward pass",
    ),
    "tied": (tied, "one", "again.weight and two.weight are one tensor"),
    "beside": (
        lambda: users(
            lambda m, x: ending(m, m.two(torch.cat([m.one(x), x], 1))),
            **convolutions(two=nn.Conv2d(7, 6, 3, padding=1)),
        ),
        "one",
        "its channels do not come to two one by one, in order",
    ),
    "mixed": (
        lambda: users(lambda m, x: ending(m, m.two(torch.softmax(m.one(x), 1))), **convolutions()),
        "one",
        "its channels do not come to two one by one, in order",
    ),
    "summed": (
        lambda: users(
            lambda m, x: ending(m, m.two(torch.cumsum(m.one(x), 1))),
            **convolutions(one=nn.Conv2d(2, 2, 3, padding=1), two=nn.Conv2d(2, 6, 3, padding=1)),
        ),
        "one",
        "its channels do not come to two one by one, in order",
    ),
    "channels last": (
        lambda: users(
            lambda m, x: m.head(F.avg_pool2d(m.two(m.one(x)), 2).permute(0, 2, 3, 1).flatten(1)), **convolutions()
        ),
        "two",
        "its channels do not come to head one by one, in order",
    ),
    "skipped": (
        lambda: users(
            lambda m, x: ending(m, m.two(torch.relu(m.one(x) + F.pad(x, (0, 0, 0, 0, 0, 3))))), **convolutions()
        ),
        "one",
        "its channels meet the model's input before two",
    ),
    "fixed shape": (
        lambda: users(lambda m, x: m.head(F.avg_pool2d(m.two(m.one(x)), 2).reshape(len(x), 6 * 16)), **convolutions()),
        "two",
        "without some of its channels the model fails: ",
    ),
    "own parameter": (
        lambda: users(
            lambda m, x: ending(m, m.two(m.one(x) * m.scale)),
            scale=nn.Parameter(torch.ones(5, 1, 1)),
            **convolutions(),
        ),
        "one",
        "without some of its channels the model fails: ",
    ),
    "counted": (
        lambda: users(lambda m, x: ending(m, m.two(m.one(x) / m.one.out_channels)), **convolutions()),
        "one",
        "without some of its channels the model computes something else",
    ),
    "together": (lambda: users(counting, **convolutions()), "two", "without some of its channels the model computes"),
    "subclass": (
        lambda: users(plain, **convolutions(one=type("Odd", (nn.Conv2d,), {})(2, 5, 3, padding=1))),
        "one",
        "one is a Odd, which may use its weight in a way of its own",
    ),
    "unused": (
        lambda: users(
            lambda m, x: m.head(torch.relu(m.two(x)).flatten(1)) + 0 * len(m.one(x)),
            **convolutions(two=nn.Conv2d(2, 6, 3, padding=1), head=nn.Linear(384, 3)),
        ),
        "one",
        "no layer reads its outputs",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_followed_is_refused_by_name(case: str) -> None:
    make, layer, why = REFUSED[case]
    model = make()
    assert refusals(model, SHAPE)[layer].startswith(why)
    with pytest.raises(ValueError, match=f"^channels of {layer} cannot be removed: "):
        shrunk(model, {layer: torch.tensor([0])}, SHAPE)
    for group in refusals(model, SHAPE).keys() ^ {"one", "two", "head", *(["again"] if case == "tied" else [])}:
        check_equal(model, {group: torch.tensor([1, 3])})  # and the others go as ever
