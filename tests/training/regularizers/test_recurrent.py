"""Where masks and zoneout are put. What they do is tested with the layer, what all regularisers keep in the suite."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from fedsim import params as p
from fedsim import rng
from fedsim.models.layers.keyed import key_names
from fedsim.models.layers.lstm import Lstm, Rates, TypeDropout
from fedsim.models.mlp import mlp
from fedsim.models.recurrent import char_lstm
from fedsim.training import regularizers as r
from fedsim.training.objective import PLAIN

TOKENS = torch.tensor([[1, 2, 0, 3, 4, 4], [2, 2, 1, 0, 3, 1]])


def model():
    with rng.torch_seeded(1):
        return char_lstm((6,), 5, embedding=3, hidden=4).double()


def test_both_combine_on_one_lstm_in_any_order():
    regularizers = [r.tied_dropout(p_input=0.1, p_hidden=0.2, p_embedding=0.3), r.zoneout(cell=0.4, hidden=0.05)]
    outputs = []
    for order in (regularizers, regularizers[::-1]):
        bound, before = model(), model().state_dict()
        assert r.bind(bound, order) == PLAIN
        assert bound.lstm.rates == Rates(0.1, 0.2, 0.4, 0.05) and bound.embedding.p == 0.3
        assert p.same_bits(bound.state_dict(), before)
        assert key_names(bound) == ("embedding.key", "lstm.key")
        outputs.append(bound(TOKENS))
    assert torch.equal(*outputs)


def test_in_evaluation_tied_dropout_leaves_the_model_as_it_was():
    bound, original = model().eval(), model().eval()
    r.bind(bound, [r.tied_dropout(p_input=0.5, p_hidden=0.5, p_embedding=0.5)])
    torch.testing.assert_close(bound(TOKENS), original(TOKENS), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(bound.train()(TOKENS), original(TOKENS))


def test_tied_dropout_is_right_in_the_mean():
    """Of a linear read-out of the first step's input product, where nothing nonlinear comes between: E[z] = 1."""
    bound, keys = model(), 4000
    r.bind(bound, [r.tied_dropout(p_input=0.3, p_hidden=0.0, p_embedding=0.2)])
    vectors = bound.embedding.weight.detach()[TOKENS[:1, 0]]
    found = torch.zeros_like(vectors)
    for key in range(keys):
        given = {"key": rng.as_tensor(key)}
        out = functional_call(bound.embedding, given, (TOKENS[:1],))[:, 0]
        found += out.detach() * bound.lstm._mask(rng.as_tensor(-key), 0.3, 1, 3, torch.float64) / keys
    # variance of z_e * z_x is 1 / (0.8 * 0.7) - 1; four standard deviations for each of three entries
    assert bool(((found - vectors).abs() < 4 * vectors.abs() * ((1 / 0.56 - 1) / keys) ** 0.5).all())


@pytest.mark.parametrize(("made", "kind"), [(r.zoneout(), nn.Embedding), (r.tied_dropout(), TypeDropout)])
def test_only_what_is_asked_for_is_changed(made, kind):
    bound = model()
    r.bind(bound, [made])
    assert type(bound.lstm) is Lstm and type(bound.embedding) is kind


def test_with_only_types_dropped_torchs_lstm_stays():
    bound = model()
    r.bind(bound, [r.tied_dropout(p_input=0.0, p_hidden=0.0, p_embedding=0.1)])
    assert type(bound.lstm) is nn.LSTM and type(bound.embedding) is TypeDropout


@pytest.mark.parametrize("made", [r.zoneout(), r.tied_dropout(), r.tied_dropout(p_input=0.0, p_hidden=0.0)])
def test_models_without_an_lstm_are_refused(made):
    with pytest.raises(ValueError, match=r"^needs an LSTM; char-lstm has one$"):
        r.bind(mlp((2, 3), 3), [made])


def test_types_need_an_embedding():
    class NoEmbedding(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(2, 3)

    assert r.bind(NoEmbedding(), [r.tied_dropout(p_embedding=0.0)]) == PLAIN
    with pytest.raises(ValueError, match=r"^p_embedding: needs an embedding; char-lstm has one$"):
        r.bind(NoEmbedding(), [r.tied_dropout(p_embedding=0.1)])


@pytest.mark.parametrize(
    ("made", "named"), [(r.zoneout, "zone_cell and zone_hidden"), (r.tied_dropout, "p_input and p_hidden")]
)
def test_the_same_twice_is_refused(made, named):
    with pytest.raises(ValueError, match=f"^the model's LSTM has {named} already$"):
        r.bind(model(), [made(), made()])
