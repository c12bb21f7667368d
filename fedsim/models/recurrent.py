"""Recurrent models of token sequences."""

from typing import cast

from torch import Tensor, nn

from fedsim.models.mlp import Count


class CharLstm(nn.Module):
    """Embedding, stacked LSTM, and one linear head at every position."""

    def __init__(self, vocabulary: int, *, embedding: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.lstm = nn.LSTM(embedding, hidden, num_layers=layers, batch_first=True)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (batch, time) in [0, vocabulary) to logits (batch, time, vocabulary); the state starts at 0."""
        states, _ = self.lstm(self.embedding(tokens))  # (batch, time, hidden)
        return cast(Tensor, self.head(states))


def char_lstm(
    input_shape: tuple[int, ...],
    num_classes: int,
    *,
    embedding: Count = 8,
    hidden: Count = 256,
    layers: Count = 2,
) -> nn.Module:
    """The character LSTM of the FedAvg paper: embedding 8, two LSTM layers of 256, a guess at every position.

    Args:
        input_shape: (time,), int64 tokens.
        num_classes: size of the vocabulary, of inputs and outputs alike.
        embedding: width of the embedding.
        hidden: width of each LSTM layer.
        layers: number of LSTM layers.

    Raises:
        ValueError: inputs are not sequences.

    Source: McMahan et al. 2017, arXiv:1602.05629, section 3. Differs: torch's LSTM has two bias vectors per layer and
        no peepholes. A vocabulary of 258 gives 867,090 parameters; the paper's 866,578 fits one bias vector and
        peepholes. ``torch.func.vmap`` has no rule for torch's LSTM: clients train one after another, unless
        ``tied-dropout`` or ``zoneout`` make it one of plain cells.
    """
    if len(input_shape) != 1:
        raise ValueError(f"model.name: char-lstm needs token sequences (time,), got shape {input_shape}")
    return CharLstm(num_classes, embedding=embedding, hidden=hidden, layers=layers)
