import copy
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call, vmap

from fedsim import rng
from fedsim.models.layers.inputs import Cutout, MixingKey


def run(layer: Cutout, x: Tensor, key: int | Tensor) -> Tensor:
    out = functional_call(layer, {"key": key if isinstance(key, Tensor) else rng.as_tensor(key)}, (x,))
    assert isinstance(out, Tensor)
    return out


@pytest.mark.parametrize(
    ("sides", "length"), [((8, 8), 3), ((5, 9), 4), ((9, 5), 5), ((6, 6), 1), ((7, 4), 2), ((3, 3), 3), ((1, 1), 1)]
)
def test_the_output_is_that_of_a_slow_loop(sides, length):
    height, width = sides
    x = rng.normal(1, 40, 3, *sides)
    u, expected = rng.uniform(7, 40, 2).tolist(), x.clone()
    for image, (down, right) in enumerate(u):
        top, left = math.floor(down * height) - length // 2, math.floor(right * width) - length // 2
        for row, column in itertools.product(range(top, top + length), range(left, left + length)):
            if 0 <= row < height and 0 <= column < width:
                expected[image, :, row, column] = 0
    assert torch.equal(run(Cutout(length), x, 7), expected)


@given(key=st.integers(0, 2**64 - 1), height=st.integers(1, 12), width=st.integers(1, 12), data=st.data())
@settings(deadline=None, max_examples=60)
def test_zeros_are_one_rectangle_in_all_channels_and_a_square_where_it_fits(key, height, width, data):
    length = data.draw(st.integers(1, min(height, width)))
    cut = (run(Cutout(length), torch.ones(5, 2, height, width), key) == 0).numpy()
    assert np.array_equal(cut[:, 0], cut[:, 1])
    for image in cut[:, 0]:
        rows, columns = image.any(1), image.any(0)
        assert np.array_equal(image, np.outer(rows, columns))
        for hit in (rows, columns):
            places = np.flatnonzero(hit)
            assert len(places) == places[-1] - places[0] + 1 <= length
            assert len(places) >= (length + 1) // 2  # the centre is inside
            if places[0] > 0 and places[-1] < len(hit) - 1:
                assert len(places) == length


@pytest.mark.parametrize(("sides", "length"), [((8, 8), 3), ((6, 9), 4)])
def test_each_pixel_is_cut_as_often_as_centres_reach_it(sides, length):
    """n = 40,000 images; 5.5 standard deviations wide for each of up to 54 pixels: a false alarm below 3e-6."""
    n = 40_000
    cut = (run(Cutout(length), torch.ones(n, 1, *sides), 3) == 0)[:, 0].double().mean(0).numpy()
    along = []
    for side in sides:
        reached = np.zeros(side)
        for centre in range(side):
            reached[max(0, centre - length // 2) : centre - length // 2 + length] += 1 / side
        along.append(reached)
    chance = np.outer(*along)
    assert chance[0, 0] < chance[3, 3]
    assert (abs(cut - chance) < 5.5 * np.sqrt(chance * (1 - chance) / n)).all()


@pytest.mark.parametrize(("side", "length"), [(8, 3), (28, 9), (32, 11), (1, 1), (2, 1), (3, 1), (4, 1), (5, 2)])
def test_by_default_the_side_is_a_third_of_the_images(side, length):
    x = rng.normal(side, 6, 1, side, side + 3)
    assert torch.equal(run(Cutout(), x, 5), run(Cutout(length), x, 5))


def test_rows_added_to_a_batch_change_no_other_row_and_lanes_are_alone():
    x, keys = rng.normal(3, 3, 6, 2, 7, 7), torch.tensor([4, -9, 2**60])
    assert torch.equal(run(Cutout(3), x[0], 4)[:3], run(Cutout(3), x[0, :3], 4))
    together = vmap(lambda x, key: run(Cutout(3), x, key))(x, keys)
    assert torch.equal(together, torch.stack([run(Cutout(3), *own) for own in zip(x, keys, strict=True)]))
    assert not torch.equal(run(Cutout(3), x[0], 4) == 0, run(Cutout(3), x[0], 5) == 0)


def test_in_evaluation_nothing_is_cut():
    x = rng.normal(1, 4, 1, 5, 5)
    assert torch.equal(run(Cutout().eval(), x, 1), x)


def test_what_it_cannot_cut_is_refused_in_evaluation_too():
    with pytest.raises(ValueError, match="length must be >= 1, got 0"):
        Cutout(0)
    with pytest.raises(ValueError, match=r"cutout needs images \(batch, .* got shape \(3, 4\)"):
        Cutout().eval()(torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"length must be at most the smaller side of an image, 8, got 9"):
        Cutout(9)(torch.ones(2, 1, 8, 28))
    assert not Cutout(8)(torch.ones(2, 1, 8, 28)).all()


def test_layers_can_be_copied_and_sent():
    x = rng.normal(1, 3, 1, 6, 6)
    for other in (copy.deepcopy(Cutout(2)), pickle.loads(pickle.dumps(Cutout(2)))):
        assert torch.equal(run(other, x, 3), run(Cutout(2), x, 3))
    assert MixingKey()(x) is x and "length=2" in repr(Cutout(2))
