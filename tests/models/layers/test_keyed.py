import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fedsim import params, rng
from fedsim.models.layers.keyed import Keyed, key_names, step_keys


class Noise(Keyed):
    def forward(self, x: Tensor) -> Tensor:
        return x + rng.normal(self.key, *x.shape)


def two_noises() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 3), nn.Sequential(Noise(), nn.ReLU()), Noise())


def test_names_are_those_of_the_key_buffers_in_module_order() -> None:
    model = two_noises()
    assert key_names(model) == ("1.0.key", "2.key")
    assert set(key_names(model)) == {name for name, _ in model.named_buffers()}
    assert key_names(Noise()) == ("key",)
    assert key_names(nn.Linear(2, 2)) == ()


def test_keys_are_in_no_state_dict_and_in_no_broadcast() -> None:
    model = two_noises()
    trainable, buffers = params.of(model)
    assert set(model.state_dict()) == set(trainable) == {"0.weight", "0.bias"}
    assert not buffers


def test_a_step_key_is_folded_with_each_layers_path() -> None:
    keys = step_keys(("1.0.key", "2.key", "key"), -7)
    expected = {"1.0.key": rng.fold(-7, "1.0"), "2.key": rng.fold(-7, "2"), "key": rng.fold(-7, "")}
    assert {name: int(key) % 2**64 for name, key in keys.items()} == {n: k % 2**64 for n, k in expected.items()}
    assert all(key.dtype == torch.int64 and key.shape == () for key in keys.values())


def test_a_batch_of_step_keys_gives_the_keys_of_each_with_and_without_vmap() -> None:
    names = ("a.key", "b.key")
    clients = torch.tensor([3, -5, 2**62])
    alone = [step_keys(names, int(key)) for key in clients]
    stacked = step_keys(names, clients)
    mapped = vmap(lambda key: step_keys(names, key))(clients)
    for name in names:
        expected = torch.stack([keys[name] for keys in alone])
        assert torch.equal(stacked[name], expected)
        assert torch.equal(mapped[name], expected)


def test_keys_reach_the_layers_through_functional_call_and_leave_no_trace() -> None:
    model = nn.Sequential(Noise(), Noise())
    x = torch.zeros(4, 5)
    first, second = (rng.normal(rng.fold(9, path), 4, 5) for path in ("0", "1"))
    out = functional_call(model, step_keys(key_names(model), 9), (x,))
    assert torch.equal(out, first + second)
    assert all(int(key) == 0 for _, key in model.named_buffers())


def test_without_keys_a_layer_repeats_the_draws_of_key_zero() -> None:
    x = torch.zeros(6)
    assert torch.equal(Noise()(x), rng.normal(0, 6))


def test_a_change_of_dtype_leaves_the_key_an_integer() -> None:
    assert Noise().double().key.dtype == torch.int64
