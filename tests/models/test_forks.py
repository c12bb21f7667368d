import copy
import pickle
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.func import functional_call

from fedsim import params as p
from fedsim import rng
from fedsim.models import places
from fedsim.models.forks import Forked, Manner, Split, Together, anew, divided, fork, several_heads, showing
from fedsim.models.layers.attaching import attach_first
from fedsim.models.layers.dropouts import Dropout
from fedsim.models.layers.keyed import adds_axis, key_names, step_keys
from fedsim.models.layers.samples import Samples
from fedsim.models.layers.weights import StochasticLinear, add_noise
from fedsim.models.zoo import MODELS, check_model

LIKE = {"rtol": 1e-12, "atol": 1e-13}


def built(name="mlp", shape=(6,), classes=3, **keys):
    keys = keys or {"hidden": [9, 8, 7]} if name == "mlp" else keys
    with rng.torch_seeded(1):
        return MODELS[name](input_shape=shape, num_classes=classes, **keys).double()


def forked(model=None, names=None, ways=3, depth=1, samples=0, **manner):
    model = model or built()
    if samples:
        attach_first(model.get_submodule(places.head(model)), "samples", Samples(samples, 0.5))
    with rng.torch_seeded(2):
        fork(model, Split(names, ways, depth), Manner(**manner))
    return model


class Plain(nn.Module):
    """Somebody's model, which is no Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.out = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.body(x)))


def plain():
    with rng.torch_seeded(1):
        return Plain().double()


X = rng.normal(3, 5, 6, dtype=torch.float64)


def leaves(model):
    """Every path from input to head of a forked Sequential as a plain one, main path first, found without its code."""
    main = [(name, child) for name, child in model._modules.items() if name != "forks"]
    paths = [main]
    for start, branch in zip(model.starts, model.forks, strict=True):
        shared = main[: [name for name, _ in main].index(start)]
        inner = leaves(branch) if isinstance(branch, Forked) else [list(branch._modules.items())]
        paths += [shared + one for one in inner]
    return paths


def by_path(model, x):
    return torch.stack([nn.Sequential(OrderedDict(path))(x) for path in leaves(model)], 1)


@pytest.mark.parametrize(
    ("split", "heads"),
    [
        (Split(None, 3), 3),
        (Split(("fc2",), 2), 2),
        (Split(("head",), 5), 5),
        (Split(("fc2", "fc3"), 2, 2), 4),
        (Split(("head", "fc1", "fc3"), 2, 3), 8),
        (Split(None, 2, 2), 4),
        (Split(None, 3, 2), 9),
        (Split(None, 4, 0), 4),
    ],
)
def test_logits_are_those_of_every_path(split, heads):
    model, before = built(), built()
    fork(model, split, Manner())
    assert len(leaves(model)) == heads
    made = model.train()(X)
    assert made.shape == (5, heads, 3) and torch.allclose(made, by_path(model, X), **LIKE)
    assert torch.equal(made[:, 0], before(X))
    assert len({tuple(head.flatten().tolist()) for head in made.unbind(1)}) == heads  # no two alike


def test_no_name_and_no_number_of_what_was_there_changes():
    before, model = built(), forked(ways=4)
    ours, theirs = model.state_dict(), before.state_dict()
    assert p.same_bits({name: ours[name] for name in theirs}, theirs) and list(ours)[: len(theirs)] == list(theirs)
    new = [name for name in ours if name not in theirs]
    assert new == [
        f"forks.{i}.{layer}.{kind}" for i in range(3) for layer in ("fc3", "head") for kind in ("weight", "bias")
    ]
    assert all(not torch.equal(ours[name], ours[name.split(".", 2)[2]]) for name in new)


def test_evaluation_is_the_first_head_unless_another_is_asked_for():
    model, before = forked(names=("fc2", "fc3"), ways=2, depth=2).eval(), built().eval()
    heads = by_path(model, X)
    assert torch.equal(model(X), before(X))
    for shown in range(4):
        with showing(model, shown):
            assert torch.allclose(model(X), heads[:, shown], **LIKE)
    with showing(model, "mean"):
        assert torch.allclose(model(X), heads.mean(1), **LIKE)
    with showing(model, "all"):
        assert torch.allclose(model(X), heads, **LIKE)
    assert torch.equal(model(X), before(X))
    with pytest.raises(ValueError, match="needs a model with several heads"), showing(before, 0):
        pass


def test_the_mean_of_heads_is_of_logits():
    model = forked(shown="mean").eval()
    assert torch.allclose(model(X), by_path(model, X).mean(1), **LIKE)


@pytest.mark.parametrize("samples", [0, 4])
def test_the_axis_of_heads_is_right_behind_that_of_labels(samples):
    more = (samples,) if samples else ()
    model = forked(samples=samples).train()
    assert model(X).shape == (5, 3, *more, 3) and adds_axis(model)
    lstm = forked(built("char-lstm", (4,), 7, hidden=6, embedding=4, layers=1), samples=samples).train()
    assert lstm(torch.arange(8).view(2, 4) % 7).shape == (2, 4, 3, *more, 7)
    for one in (model, lstm):
        with showing(one, "all"):
            assert one.eval()(X if one is model else torch.zeros(2, 4, dtype=torch.int64)).shape[-2] == 3


def test_every_branch_draws_by_itself():
    model = built()
    attach_first(model.fc3, "dropout", Dropout(0.5))
    model = forked(model, ways=3, samples=2).train()
    assert len(key_names(model)) == 6 and "forks.1.head.samples.key" in key_names(model)
    for branch in (model, *model.forks):
        branch.load_state_dict({k: v for k, v in model.state_dict().items() if k in branch.state_dict()})  # all alike
    made = functional_call(model, step_keys(key_names(model), 5), (X,))
    assert len({tuple(one.flatten().tolist()) for one in made.flatten(1, 2).unbind(1)}) == 6
    check_model(model, (6,), 3, X[0], name="mlp")


def test_a_lone_head_is_repeated_whatever_its_class_and_what_is_in_front_of_it():
    model, before = plain(), plain()
    add_noise(model.out, "dropout", Dropout(0.3))
    forked(model, samples=2)
    assert isinstance(model.out, StochasticLinear) and isinstance(model.out, Together)
    assert p.same_bits({n: model.state_dict()[n] for n in before.state_dict()}, before.state_dict())
    assert {"out.samples.key", "out.forks.0.samples.key", "out.forks.1.noises.dropout.key"} <= {*key_names(model)}
    made = functional_call(model.train(), step_keys(key_names(model), 5), (X,))
    assert made.shape == (5, 3, 2, 3)
    h, keys = torch.tanh(model.body(X)), step_keys(key_names(model), 5)
    for i, path in enumerate(["out", "out.forks.0", "out.forks.1"]):
        x = functional_call(Samples(2, 0.5), {"key": keys[f"{path}.samples.key"]}, (h,))
        weight = model.get_parameter(f"{path}.weight")
        weight = functional_call(Dropout(0.3), {"key": keys[f"{path}.noises.dropout.key"]}, (weight,))
        expected = x @ weight.T + model.get_parameter(f"{path}.bias")
        assert torch.allclose(made[:, i], expected, **LIKE)
    assert torch.equal(model.eval()(X), before(X))
    with showing(model, "mean"):
        heads = [
            h @ model.get_parameter(f"{path}.weight").T + model.get_parameter(f"{path}.bias")
            for path in ["out", "out.forks.0", "out.forks.1"]
        ]
        assert torch.allclose(model(X), torch.stack(heads).mean(0), **LIKE)


def one_head(model, head, x):
    """Gradients of the sum of cubes of one head's logits."""
    model.train()(x)[:, head].pow(3).sum().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return grads


def all_heads(model, x):
    model.train()(x).pow(3).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("split", "shares"),
    [
        (Split(("fc3",), 3), {"fc1": 1 / 3, "fc2": 1 / 3, "fc3": 1.0, "head": 1.0}),
        (
            Split(("fc2", "fc3"), 2, 2),
            {"fc1": 1 / 4, "fc2": 1 / 2, "forks.0.fc2": 1 / 2, "forks.0.fc3": 1.0, "head": 1.0},
        ),
    ],
)
def test_shared_parts_get_the_mean_gradient_and_branches_their_own(split, shares):
    """In a tree the root gets a quarter of the sum over four heads. Forward nothing changes by a bit."""
    summed, rescaled = built(), built()
    for model, rescale in ((summed, False), (rescaled, True)):
        with rng.torch_seeded(2):
            fork(model, split, Manner(rescale=rescale))
    assert torch.equal(summed.train()(X), rescaled.train()(X))
    heads = [one_head(summed, i, X) for i in range(split.ways**split.depth)]
    grads = all_heads(rescaled, X)
    for layer, share in shares.items():
        name = f"{layer}.weight"
        total = sum(one[name] for one in heads if name in one)
        assert torch.allclose(grads[name], share * total, **LIKE)
        assert torch.allclose(all_heads(copy.deepcopy(summed), X)[name], total, **LIKE)


def test_a_lone_head_sends_back_the_mean_too():
    summed, rescaled = forked(plain()), forked(plain(), rescale=True)
    total, mean = all_heads(summed, X), all_heads(rescaled, X)
    assert torch.allclose(mean["body.weight"], total["body.weight"] / 3, **LIKE)
    assert torch.allclose(mean["out.weight"], total["out.weight"], **LIKE)


def test_dividing_leaves_values_and_tokens_alone():
    x = torch.tensor([0.1, -3.0, 1e-30, 7e7], requires_grad=True)
    made = divided(x, 3)
    made.sum().backward()
    assert torch.equal(made, x) and torch.allclose(x.grad, torch.full((4,), 1 / 3))
    tokens = torch.arange(3)
    assert divided(tokens, 3) is tokens


def test_batch_norm_of_a_branch_is_its_own():
    layers = OrderedDict(a=nn.Linear(6, 5), b=nn.Linear(5, 4), norm=nn.BatchNorm1d(4), head=nn.Linear(4, 3))
    model = nn.Sequential(layers).double()
    model.train()(X)  # statistics that a copy must not have
    fork(model, Split(("b",), 2), Manner())
    assert torch.equal(model.forks[0].norm.running_mean, torch.zeros(4, dtype=torch.float64))
    model(X)
    expected = 0.1 * model.forks[0].b(model.a(X)).mean(0)
    assert torch.allclose(model.forks[0].norm.running_mean, expected, **LIKE)


@pytest.mark.parametrize(
    "make", [lambda: forked(names=("fc2", "fc3"), ways=2, depth=2, samples=2), lambda: forked(plain(), samples=2)]
)
def test_it_can_be_copied_sent_saved_and_loaded(make):
    model = make()
    names, state = key_names(model), model.state_dict()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), make()):
        assert type(other) is type(model) and key_names(other) == names
        assert p.same_bits(other.state_dict(), state)
        keys = step_keys(names, 4)
        assert torch.equal(functional_call(other.train(), keys, (X,)), functional_call(model.train(), keys, (X,)))
        changed = {name: tensor + 1 for name, tensor in state.items()}
        other.load_state_dict(changed)
        assert p.same_bits(other.state_dict(), changed) and p.same_bits(model.state_dict(), state)


@pytest.mark.parametrize(
    ("name", "shape", "keys", "start"),
    [
        ("mlp", (6,), {}, "fc3"),
        ("linear", (6,), {}, "head"),
        ("cnn", (1, 8, 8), {}, "fc1"),
        ("conv-4", (1, 8, 8), {}, "fc2"),
        ("resnet-8", (1, 8, 8), {}, "stage3"),
    ],
)
def test_where_paths_divide_unless_told(name, shape, keys, start):
    model = built(name, shape, 3, **keys)
    fork(model, Split(None, 2), Manner())
    assert model.starts == (start,)
    with showing(model, "all"):
        assert model.eval()(torch.zeros(2, *shape, dtype=torch.float64)).shape == (2, 2, 3)


def test_places_are_those_of_the_main_path():
    before, model = built(), forked(names=("fc2", "fc3"), ways=2, depth=2)
    assert places.head(model) == "head" and places.hidden(model) == places.hidden(before)
    assert places.before_head(model) == places.before_head(before)
    lone = forked(plain())
    assert places.head(lone) == "out" and [unit.layer for unit in places.hidden(lone)] == ["body"]


def test_a_layer_for_inputs_that_comes_later_is_shared():
    model = forked(ways=2)
    attach_first(model, "twice", nn.Threshold(0.0, 0.0))
    assert torch.allclose(model.train()(X), by_path(model, X.clamp(min=0)), **LIKE)


def test_what_is_frozen_is_not_drawn_again_and_a_module_has_the_last_word_on_what_it_is_made_of():
    class Zero(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def reset_parameters(self):
            nn.init.zeros_(self.inner.weight)

    frozen, zero = nn.Linear(2, 2).requires_grad_(False), Zero()
    before = frozen.weight.clone()
    anew(nn.Sequential(frozen, zero, nn.Linear(2, 2)))
    assert torch.equal(frozen.weight, before) and (zero.inner.weight == 0).all()
    with pytest.raises(ValueError, match="needs layers with reset_parameters"):
        anew(nn.Sequential(frozen, nn.ReLU()))


@pytest.mark.parametrize(
    ("make", "split", "rule"),
    [
        (forked, Split(None, 2), "several heads already"),
        (lambda: forked(plain()), Split(None, 2), "several heads already"),
        (built, Split(("fc9",), 2), r"split must name children .*fc1, fc_relu1.*got fc9"),
        (built, Split(("fc1", "fc1"), 2, 2), "each once"),
        (built, Split(None, 2, 5), "needs 5 layers in front of which to divide, the model has 4"),
        (plain, Split(("out",), 2), "needs an nn.Sequential to divide, but out, .* is in a Plain"),
        (plain, Split(None, 2, 2), "needs an nn.Sequential"),
        (plain, Split(None, 2, 0), "needs an nn.Sequential to divide, got a Plain"),
        (
            lambda: nn.Sequential(OrderedDict(forks=nn.Linear(6, 6), head=nn.Linear(6, 3))),
            Split(None, 2),
            "name forks free",
        ),
    ],
)
def test_refused(make, split, rule):
    with pytest.raises(ValueError, match=rule):
        fork(make(), split, Manner())
    assert not several_heads(built()) and several_heads(forked())
