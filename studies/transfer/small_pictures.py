"""Fashion-MNIST cut down, as the study of the regularisers has it."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "regularisation"))

from small_data import fashion

__all__ = ["fashion"]
