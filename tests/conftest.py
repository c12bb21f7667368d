"""One torch thread per process, so that nothing depends on what else runs, and a cache of plans of the tests' own."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fedsim.data.locations import cache_folder

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def own_plans(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests measure stays among them; all else in the user's cache, such as data, is found as ever."""
    cache = tmp_path_factory.mktemp("cache")
    real = cache_folder("plans").parent
    _link(real.parent, cache, leave_out=real.name)
    _link(real, cache / real.name, leave_out="plans")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(cache))
        yield


def _link(real: Path, own: Path, leave_out: str) -> None:
    own.mkdir(exist_ok=True)
    for path in real.glob("*"):
        if path.name != leave_out:
            (own / path.name).symlink_to(path)
