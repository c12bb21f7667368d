"""Where dataset files are looked for, the same for every dataset that has files.

A given ``data.root`` is the only place looked at. Otherwise, in this order: ``$FEDSIM_DATA``, the folder a Debian
package puts the files in, and the user cache, into which missing files are then downloaded.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from fedsim.errors import DataError

_PACKAGED = {"fashion-mnist": Path("/usr/share/datasets/fashion-mnist")}  # Debian's dataset-fashion-mnist


def cache_folder(name: str) -> Path:
    """The user cache for one thing: ``$XDG_CACHE_HOME`` or ``~/.cache``, then ``fedsim/<name>``. May not exist."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "fedsim" / name


def folders(name: str, root: Path | None) -> list[Path]:
    """Folders to look for a dataset's files in, best first.

    Args:
        name: of the dataset; a root may hold its files or a subfolder of this name.
        root: ``data.root``, or None.

    Returns:
        Folders, some of which may not exist.

    Raises:
        DataError: ``data.root`` or ``$FEDSIM_DATA`` names a folder that does not exist.
    """
    if root is not None:
        return _below(root, "data.root", name)
    shared = os.environ.get("FEDSIM_DATA")
    found = _below(Path(shared), "FEDSIM_DATA", name) if shared else []
    packaged = [_PACKAGED[name]] if name in _PACKAGED else []
    return [*found, *packaged, cache_folder(name)]


def locate(name: str, root: Path | None, wanted: Sequence[Sequence[str]]) -> list[Path] | None:
    """The files of a dataset, from the first folder that holds all of them.

    Args:
        name: of the dataset.
        root: ``data.root``, or None.
        wanted: for each file the names it may have, best first. A name may contain a subfolder.

    Returns:
        One path per file, or None if no folder holds them all (they can be downloaded).

    Raises:
        DataError: a root was given and a file is not in it.
    """
    places = folders(name, root)
    for folder in places:
        paths = [_first(folder, names) for names in wanted]
        if all(path is not None for path in paths):
            return [path for path in paths if path is not None]
    if root is not None:
        fullest = max(places, key=lambda folder: sum(_first(folder, names) is not None for names in wanted))
        missing = next(names for names in wanted if _first(fullest, names) is None)
        raise DataError(
            f"data.root: no {' or '.join(missing)} in {' or '.join(map(str, places))}; "
            f"leave data.root out to let fedsim download {name}"
        )
    return None


def _below(root: Path, key: str, name: str) -> list[Path]:
    if not root.is_dir():
        raise DataError(f"{key}: folder {root} does not exist")
    return [root, root / name]


def _first(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)
