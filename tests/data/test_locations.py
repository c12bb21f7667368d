from pathlib import Path

import pytest

from fedsim.data.locations import cache_folder, folders, locate
from fedsim.errors import DataError


@pytest.fixture(autouse=True)
def only_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FEDSIM_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_root_is_the_only_place_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSIM_DATA", "/no/such/folder")
    assert folders("mnist", tmp_path) == [tmp_path, tmp_path / "mnist"]


def test_without_a_root_the_order_is_fedsim_data_then_debian_then_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSIM_DATA", str(tmp_path))
    assert folders("fashion-mnist", None) == [
        tmp_path,
        tmp_path / "fashion-mnist",
        Path("/usr/share/datasets/fashion-mnist"),
        tmp_path / "cache" / "fedsim" / "fashion-mnist",
    ]


def test_a_fedsim_data_that_does_not_exist_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSIM_DATA", "/no/such/folder")
    with pytest.raises(DataError, match="FEDSIM_DATA: folder /no/such/folder does not exist"):
        folders("mnist", None)


def test_the_cache_is_below_the_home_folder_unless_xdg_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder("mnist") == Path.home() / ".cache" / "fedsim" / "mnist"


def test_all_files_come_from_one_folder_and_the_first_name_wins(tmp_path: Path) -> None:
    (tmp_path / "mnist").mkdir()
    for name in ("a", "mnist/a", "mnist/a.gz", "mnist/b"):
        (tmp_path / name).write_bytes(b"")
    assert locate("mnist", tmp_path, [["a", "a.gz"], ["b"]]) == [tmp_path / "mnist" / "a", tmp_path / "mnist" / "b"]
    assert locate("mnist", None, [["a"], ["b"]]) is None


def test_files_spread_over_root_and_subfolder_are_no_set(tmp_path: Path) -> None:
    (tmp_path / "mnist").mkdir()
    (tmp_path / "a").write_bytes(b"")
    (tmp_path / "mnist" / "b").write_bytes(b"")
    with pytest.raises(DataError, match=r"data\.root: no b in .* or .*mnist; leave data\.root out"):
        locate("mnist", tmp_path, [["a"], ["b"]])
