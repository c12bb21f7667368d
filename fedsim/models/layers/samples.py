"""Several dropout samples of one batch, in one forward pass."""

from torch import Tensor

from fedsim.models.layers.dropouts import Dropout


class Samples(Dropout):
    """Several copies of each example's features, each with a dropout mask of its own: ``y_m = x * kept_m / (1 - p)``.

    What follows must work on the last axis alone, as ``nn.Linear`` and activations do; then logits come out as
    (batch, samples, classes). Entry i of the flattened result uses draw i of ``self.key``, so rows added at the end of
    a batch change no other row, and one sample has the mask of :class:`Dropout`. The identity in evaluation.

    Args:
        samples: copies of each example, >= 1.
        p: probability of a zero, in [0, 1).

    Raises:
        ValueError: p is outside [0, 1), or samples is below 1.

    Source: Inoue 2019, "Multi-Sample Dropout for Accelerated Training and Better Generalization", arXiv:1905.09788.
        Differs: scaled in training rather than in testing.
    """

    adds_axis = True

    def __init__(self, samples: int, p: float) -> None:
        super().__init__(p)
        if samples < 1:
            raise ValueError(f"samples must be >= 1, got {samples}")
        self.samples = samples

    def forward(self, x: Tensor) -> Tensor:
        """(batch, ..., features) to (batch, ..., samples, features) in training; the same ``x`` in evaluation."""
        if not self.training:
            return x
        return super().forward(x.unsqueeze(-2).expand(*x.shape[:-1], self.samples, x.shape[-1]))

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"samples={self.samples}, {super().extra_repr()}"
