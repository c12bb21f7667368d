import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from fedsim import params as p
from fedsim import rng
from fedsim.models.fractal import Fractal, FractalBlock, ending_at, fractal, single_column
from fedsim.models.layers.attaching import attach
from fedsim.models.layers.paths import DropPath, PathDraws
from fedsim.models.mlp import mlp

SHAPE = (2, 7, 5)


def net(columns=3, channels=(4, 6), norm="group"):
    with rng.torch_seeded(1):
        return fractal(SHAPE, 3, channels=list(channels), columns=columns, norm=norm).double()


def x_of(*shape):
    return rng.normal(2, *shape, dtype=torch.float64)


def expanded(block, columns, first=0):
    """f_C by the expansion rule, as (inputs of its last join) -> list; layers are taken in order from each column.

    columns: numbers of those that take part, the shortest first. first: how many layers of each are used up.
    """
    shortest, *deeper = columns
    layer = block.get_submodule(f"column{shortest}.layer{first + 1}")

    def f(z):
        if not deeper:
            return [layer(z)]
        inner = mean(expanded(block, deeper, 2 * first)(z))
        return [layer(z), *expanded(block, deeper, 2 * first + 1)(inner)]

    return f


def mean(inputs):
    return torch.stack(inputs).mean(0)


@pytest.mark.parametrize("columns", [1, 2, 3, 4])
@pytest.mark.parametrize("norm", ["none", "group"])
def test_a_block_is_the_expansion_rule(columns, norm):
    with rng.torch_seeded(1):
        block = FractalBlock(2, 3, columns=columns, norm=norm).double()
    x = x_of(2, 2, 5, 4)
    expected = mean(expanded(block, range(1, columns + 1))(x))
    assert torch.allclose(block(x), expected, rtol=1e-10)
    used = [path for path, m in block.named_modules() if isinstance(m, nn.Conv2d)]
    assert len(used) == 2**columns - 1


def test_the_net_is_blocks_with_pools_between_them_and_a_head():
    model, x = net(norm="none"), x_of(3, *SHAPE)
    y = nn.functional.max_pool2d(model.body.block1(x), 2, ceil_mode=True)
    y = model.body.block2(y).mean((2, 3)) @ model.head.weight.T + model.head.bias
    assert torch.allclose(model(x), y, rtol=1e-10)


def test_a_single_column_is_its_layers_one_after_another_and_the_model_stays_as_it_is():
    model, x = net(), x_of(3, *SHAPE)
    whole, state = model(x), copy.deepcopy(model.state_dict())
    results = []
    for column in (1, 2, 3):
        alone = single_column(model, column)
        y = x
        for i, block in enumerate((model.body.block1, model.body.block2)):
            y = nn.functional.max_pool2d(y, 2, ceil_mode=True) if i else y
            for number in range(1, 2 ** (column - 1) + 1):
                y = block.get_submodule(f"column{column}.layer{number}")(y)
        results.append(alone(x))
        assert torch.allclose(results[-1], model.head(y.mean((2, 3))), rtol=1e-10)
        assert p.same_bits(alone.state_dict(), state)
    assert not torch.allclose(results[0], results[1]) and not torch.allclose(results[1], results[2])
    assert torch.equal(model(x), whole)


def test_with_one_column_the_net_is_that_column():
    model, x = net(columns=1), x_of(3, *SHAPE)
    assert torch.equal(model(x), single_column(model, 1)(x))
    assert model.body.joins() == []


def test_a_copy_of_one_column_takes_the_parameters_that_a_federation_has_trained():
    model, x = net(), x_of(3, *SHAPE)
    other = {name: 1.3 * tensor for name, tensor in p.of(model)[0].items()}
    alone = functional_call(single_column(model, 2), other, (x,))
    model.load_state_dict(other)
    assert torch.equal(alone, single_column(model, 2)(x))


def weighted(model, draws, key, x):
    """With drop-path, in training."""
    model.body.droppath = DropPath(model.body.columns, model.body.joins(), draws)
    model.train()
    return functional_call(model, {"body.droppath.key": rng.as_tensor(key)}, (x,))


def test_a_global_draw_computes_what_the_column_does_by_itself():
    x, found = x_of(6, *SHAPE), set()
    alone = [single_column(net(), column)(x) for column in (1, 2, 3)]
    for key in range(12):
        y = weighted(net(), PathDraws(0.3, 1.0, "batch"), key, x)
        found |= {c for c in range(3) if torch.allclose(y, alone[c], rtol=1e-10)}
        assert any(torch.allclose(y, one, rtol=1e-10) for one in alone)
    assert found == {0, 1, 2}
    rows = weighted(net(), PathDraws(0.3, 1.0, "row"), 1, x)
    chosen = [[c for c in range(3) if torch.allclose(row, alone[c][i], rtol=1e-10)] for i, row in enumerate(rows)]
    assert all(len(one) == 1 for one in chosen) and len({c for (c,) in chosen}) > 1


def test_joins_take_the_weights_that_are_drawn_for_them_in_order():
    """Against the rows of the grid written out for three columns, each weight by hand."""
    model, x, draws = net(norm="none"), x_of(4, *SHAPE), PathDraws(0.4, 0.3, "row")
    layer = DropPath(3, model.body.joins(), draws)
    assert model.body.joins() == [[1, 2], [0, 1, 2]] * 2
    y = x
    weights = functional_call(layer, {"key": rng.as_tensor(5)}, (x,))
    for i, block in enumerate((model.body.block1, model.body.block2)):
        y = nn.functional.max_pool2d(y, 2, ceil_mode=True) if i else y
        half, whole = weights[2 * i], weights[2 * i + 1]
        short, middle, deep = block.column1, block.column2, block.column3
        inner = [middle.layer1(y), deep.layer2(deep.layer1(y))]
        joined = torch.stack([sum(half[n, k] * inner[k][n] for k in range(2)) for n in range(4)])
        last = [short.layer1(y), middle.layer2(joined), deep.layer4(deep.layer3(joined))]
        y = torch.stack([sum(whole[n, k] * last[k][n] for k in range(3)) for n in range(4)])
    expected = y.mean((2, 3)) @ model.head.weight.T + model.head.bias
    assert torch.allclose(weighted(model, draws, 5, x), expected, rtol=1e-10)


def test_in_evaluation_joins_are_plain_means():
    model, x = net(), x_of(4, *SHAPE)
    plain = model(x)
    drawn = weighted(model, PathDraws(0.4, 0.5, "batch"), 5, x)
    assert not torch.allclose(drawn, plain)
    assert torch.equal(model.eval()(x), plain)


def test_a_layer_put_behind_the_body_is_called_once():
    model, x = net(), x_of(2, *SHAPE)
    before = model(x) - model.head.bias
    attach(model.body, "doubled", Doubled())
    assert torch.allclose(model(x) - model.head.bias, 2 * before, rtol=1e-10)


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def test_rows_at_which_columns_end():
    assert [ending_at(row, 1) for row in (1,)] == [[0]]
    assert [len(ending_at(row, 4)) for row in range(1, 9)] == [1, 2, 1, 3, 1, 2, 1, 4]


def test_columns_that_are_not_there_are_refused():
    for column in (0, 4):
        with pytest.raises(ValueError, match=rf"column must be in \[1, 3\], got {column}"):
            single_column(net(), column)
    with pytest.raises(ValueError, match="needs columns; fractal has them"):
        single_column(mlp((4,), 3), 1)
    with pytest.raises(ValueError, match="fractal needs image inputs"):
        fractal((28, 28), 3)
    assert isinstance(net().body, Fractal)
