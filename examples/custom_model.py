"""Your own model in a federation: any torch.nn.Module, named in the config. Run: python examples/custom_model.py"""

import sys
from pathlib import Path

from torch import Tensor, cat, nn

import fedsim


class TwoTowers(nn.Module):
    """Reads an image by rows and by columns. The shape and the classes come from the data, the rest from YAML."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int, width: int = 32, dropout: float = 0.2) -> None:
        super().__init__()
        _, height, breadth = input_shape
        self.rows, self.columns = nn.Linear(breadth, width), nn.Linear(height, width)
        self.dropout = nn.Dropout(dropout)  # fedsim puts a repeatable one in its place
        self.head = nn.Linear(width * (height + breadth), num_classes)

    def forward(self, images: Tensor) -> Tensor:
        image = images[:, 0]  # (batch, height, breadth)
        by_row, by_column = self.rows(image).relu(), self.columns(image.mT).relu()  # (batch, height or breadth, width)
        return self.head(self.dropout(cat([by_row.flatten(1), by_column.flatten(1)], dim=1)))


def main() -> None:
    config = {
        "name": "custom-model",
        "data": {"dataset": "digits", "clients": 10, "split": {"name": "dirichlet", "alpha": 1.0}},
        "model": {"name": "custom_model:TwoTowers", "width": 24},
        "train": {"rounds": 10, "clients_per_round": 5, "optimizer": {"name": "sgd", "lr": 0.2}},
    }
    run = fedsim.run(config)
    print(f"accuracy {run.summary['accuracy']:.3f} with {run.summary['model']['parameters']:,} parameters")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))  # so that "custom_model" can be imported by its name
    main()
