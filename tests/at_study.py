"""Studies are scripts beside each other, whose modules may have the same names: one study at a time is importable."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

STUDIES = Path(__file__).parents[1] / "studies"


@contextmanager
def at_study(name: str, modules: Sequence[str]) -> Iterator[None]:
    """Import these modules from this study, and forget them after."""
    others = {module: sys.modules.pop(module) for module in modules if module in sys.modules}  # of another study
    sys.path.insert(0, str(STUDIES / name))
    try:
        yield
    finally:
        sys.path.remove(str(STUDIES / name))
        for module in modules:
            sys.modules.pop(module, None)
        sys.modules.update(others)
