"""Your own data in a federation: a function that returns arrays or Datasets. Run: python examples/custom_dataset.py"""

import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_breast_cancer

import fedsim


def hospitals(*, owners: int = 8) -> dict[str, np.ndarray]:
    """Breast-cancer measurements, dealt to hospitals by tumour size; the column ``hospital`` says who has what."""
    x, y = load_breast_cancer(return_X_y=True)
    x = (x - x.mean(0)) / x.std(0)
    by_size = np.argsort(np.argsort(x[:, 0]))  # rank of each patient
    return {"x": x, "y": y, "column_hospital": by_size * owners // len(x)}


def main() -> None:
    config = {
        "name": "custom-dataset",
        "data": {
            "dataset": {"name": "custom_dataset:hospitals", "owners": 6},
            "clients": None,  # as many as there are hospitals
            "split": {"name": "natural", "column": "hospital"},
        },
        "model": "linear",
        "train": {"rounds": 20, "optimizer": {"name": "sgd", "lr": 0.1}},
    }
    run = fedsim.run(config)
    last = run.rounds[-1]
    print(
        f"accuracy {last.accuracy:.3f}; over hospitals {last.client_accuracy_mean:.3f} ± {last.client_accuracy_std:.3f}"
    )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))  # so that "custom_dataset" can be imported by its name
    main()
