"""How transforms follow each other, and what the factories make."""

import inspect
import pickle

import pytest
import torch

from fedsim.transforms import compression as c
from fedsim.transforms.table import TRANSFORMS
from fedsim.transforms.transform import Compression, Transform, compose
from fedsim.wire.quantised import CODINGS


def test_nothing_is_no_compression():
    assert compose([]) is None


@pytest.mark.parametrize(
    ("made", "coding", "error_feedback", "unbiased"),
    [
        ([c.top_k()], "exact", True, False),
        ([c.top_k(error_feedback=False)], "exact", False, False),
        ([c.random_k()], "exact", False, True),
        ([c.random_k(error_feedback=True)], "exact", True, False),
        ([c.random_k(), c.quantise(bits=4, error_feedback=True)], "uniform4", True, False),
        ([c.top_k(), c.quantise()], "uniform8", True, False),
        ([c.qsgd(bits=2)], "qsgd2", False, False),
        ([c.sign()], "sign", True, False),
        ([c.half(dtype="bf16")], "bf16", False, False),
        ([c.sparse()], "exact", False, False),
    ],
)
def test_transforms_together(made, coding, error_feedback, unbiased):
    found = compose(made)
    assert (found.coding, found.error_feedback, found.unbiased) == (coding, error_feedback, unbiased)
    assert found.selection == made[0].selection


@pytest.mark.parametrize(
    ("made", "why"),
    [
        ([c.quantise(), c.top_k()], "^top-k must come before quantise: what was coded are bytes"),
        ([c.sparse(), c.random_k()], "^random-k must come before sparse: "),
        ([c.top_k(), c.random_k()], "^at most one may select entries, got top-k and random-k$"),
        ([c.top_k(), c.top_k()], "^at most one may select entries, got top-k and top-k$"),
        ([c.sign(), c.half()], "^at most one may code values, got sign and half$"),
        ([Transform("own", coding="zip")], r"^own: coding must be one of exact, .*, got 'zip'$"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(made, why):
    with pytest.raises(ValueError, match=why):
        compose(made)


def test_every_choice_of_a_literal_has_a_coding():
    choices = {"bits": {"quantise": (8, 4), "qsgd": (8, 4, 2)}, "dtype": {"half": ("fp16", "bf16")}}
    made = [TRANSFORMS[name](**{key: one}) for key, by in choices.items() for name, ones in by.items() for one in ones]
    assert all(one.coding in CODINGS for one in made)
    assert len({one.coding for one in made}) == len(made)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_each_has_its_name_and_can_be_pickled_and_alone(name):
    assert all(p.kind is p.KEYWORD_ONLY for p in inspect.signature(TRANSFORMS[name]).parameters.values())
    made = compose([TRANSFORMS[name]()])
    assert TRANSFORMS[name]().name == name
    again = pickle.loads(pickle.dumps(made))
    assert isinstance(again, Compression) and again.coding == made.coding
    if made.selection is not None:
        tensors = {"w": torch.linspace(-1, 2, 300)}
        found, expected = (one.selection.pick(tensors, 7)["w"] for one in (again, made))
        assert int(expected.sum()) == 3 and torch.equal(found, expected)
