import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.func import functional_call, vmap

from fedsim import params, rng
from fedsim.models.recurrent import char_lstm


def by_hand(weights: params.Params, tokens: Tensor, layers: int) -> Tensor:
    """One sequence, one position, one layer at a time. Gates in torch's order: input, forget, cell, output."""
    hidden = weights["lstm.weight_hh_l0"].shape[1]
    outputs = []
    for sequence in tokens:
        h, c = (torch.zeros(layers, hidden, dtype=torch.float64) for _ in range(2))
        for token in sequence:
            x = weights["embedding.weight"][token]
            for k in range(layers):
                gates = weights[f"lstm.weight_ih_l{k}"] @ x + weights[f"lstm.weight_hh_l{k}"] @ h[k]
                gates = gates + weights[f"lstm.bias_ih_l{k}"] + weights[f"lstm.bias_hh_l{k}"]
                i, f, g, o = gates.reshape(4, hidden)
                c[k] = c[k] / (1 + torch.exp(-f)) + torch.tanh(g) / (1 + torch.exp(-i))
                h[k] = torch.tanh(c[k]) / (1 + torch.exp(-o))
                x = h[k]
            outputs.append(weights["head.weight"] @ x + weights["head.bias"])
    return torch.stack(outputs).reshape(*tokens.shape, -1)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_char_lstm_equals_a_slow_loop(layers: int) -> None:
    model = char_lstm((5,), 7, embedding=3, hidden=4, layers=layers).double()
    tokens = rng.bits(1, 3, 5) % 7
    expected = by_hand({name: p.detach() for name, p in model.named_parameters()}, tokens, layers)
    torch.testing.assert_close(model(tokens).detach(), expected, rtol=1e-10, atol=1e-12)


def test_a_later_token_changes_no_earlier_guess() -> None:
    model = char_lstm((6,), 7)
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6]])
    changed = tokens.clone()
    changed[0, 4] = 0
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.equal(before[:, 4:], after[:, 4:])


def test_gradients_equal_finite_differences() -> None:
    with rng.torch_seeded(4):
        model = char_lstm((4,), 5, embedding=2, hidden=3, layers=2).double()
    trainable, _ = params.of(model)
    tokens = torch.tensor([[0, 4, 1, 1], [3, 2, 0, 4]])

    def logits(*values: Tensor) -> Tensor:
        return functional_call(model, dict(zip(trainable, values, strict=True)), (tokens,))

    assert gradcheck(logits, [p.requires_grad_() for p in trainable.values()])


def test_inputs_that_are_no_sequences_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"model.name: char-lstm needs token sequences \(time,\), got shape \(1, 8, 8\)"
    ):
        char_lstm((1, 8, 8), 10)


def test_torch_cannot_map_its_lstm_over_stacked_clients() -> None:
    """As its docstring says. When this fails, torch has learned it: add char-lstm to STACKABLE in test_zoo."""
    model = char_lstm((4,), 5, embedding=2, hidden=3, layers=1)
    stacked = params.stack([params.of(model)[0]] * 2)
    tokens = torch.zeros(2, 3, 4, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="aten::lstm"):
        vmap(lambda p, x: functional_call(model, p, (x,)))(stacked, tokens)
