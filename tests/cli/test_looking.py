import json

import numpy as np
import pytest

from fedsim.cli import looking
from fedsim.config.tables import KINDS


def test_list_shows_every_component_with_its_first_docstring_line_and_keys(fedsim):
    text = fedsim("list").out
    for kind in KINDS.values():
        for name, factory in kind.table.items():
            assert f"  {name:<16} {factory.__doc__.splitlines()[0]}" in text
    assert "      shards_per_client: int >= 1  (default 2)\n" in text
    assert "      alpha: float >= 1e-06 <= 1000000.0  (needed)\n" in text


def test_list_shows_one_kind(fedsim):
    text = fedsim("list", "strategies").out
    assert text.startswith("strategies  (strategy)\n  fedavg ")
    assert "splits" not in text
    assert "      every: int >= 1  (needed)\n" in fedsim("list", "schedules").out


def test_list_shows_pruning_methods(fedsim):
    text = fedsim("list", "pruning").out
    assert text.startswith("pruning  (pruning)\n  lottery-ticket ")
    assert "      rate: float > 0 < 1  (default 0.2)\n" in text and "  l1-filter " in text


def test_schema_is_json(fedsim):
    schema = json.loads(fedsim("schema").out)
    assert set(schema["properties"]) >= {"name", "data", "model", "train", "extends"}


def test_split_shows_a_table_and_writes_a_picture(fedsim, folder):
    result = fedsim("split", "config.yaml", "--save", "kept.npz")
    assert (result.code, result.err) == (0, "")
    assert {path.removeprefix(f"{folder}/") for path in result.new} == {"split.png", "kept.npz"}
    assert (folder / "split.png").read_bytes()[:4] == b"\x89PNG"
    head, *rows = [line.split() for line in result.out.splitlines()[:7]]
    assert head == ["client", "examples", "test", *"0123456789", "effective", "classes", "EMD"]
    with np.load(folder / "kept.npz") as kept:
        assert [int(row[1]) for row in rows] == np.diff(kept["offsets"]).tolist()


def test_a_saved_split_can_be_used(fedsim, folder):
    first = fedsim("split", "config.yaml", "--save", "kept.npz").out
    again = fedsim("split", "config.yaml", "data.split={name: file, path: kept.npz}").out
    assert again.splitlines()[:7] == first.splitlines()[:7]


def test_a_split_over_many_clients_is_cut(fedsim):
    lines = fedsim("split", "config.yaml", "data.clients=100", "data.split=iid").out.splitlines()
    assert lines[41].split()[:2] == ["+60", "..."]


@pytest.mark.parametrize(("columns", "found"), [("80", True), ("50", False)])
def test_class_columns_are_left_out_where_they_do_not_fit(fedsim, monkeypatch, columns, found):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal for rich, so that its width counts
    out = fedsim("split", "config.yaml").out
    assert ("\x1b[1m7 " in out) is found
    assert "effective classes" in out


def test_report_is_written_again(fedsim, folder):
    fedsim("run", "config.yaml", "train.rounds=1")
    (run,) = (folder / "runs").iterdir()
    (run / "report.html").unlink()
    result = fedsim("report", str(run))
    assert (result.code, result.out) == (0, f"{run}/report.html\n")
    assert (run / "report.html").exists()


def test_looking_may_be_cut_short_by_its_reader(process):
    looking = process("list")
    looking.stdout.readline()
    looking.stdout.close()
    assert looking.stderr.read() == ""
    assert looking.wait(timeout=30) == 0


@pytest.fixture
def three(fedsim, folder):
    """Runs of one round with seeds 1, 2 and 1 again."""
    for seed in (1, 2, 1):
        fedsim("run", "config.yaml", "train.rounds=1", f"seed={seed}")
    return sorted((folder / "runs").iterdir())


def test_compare_says_how_seeds_are_averaged_and_warns_of_repeated_ones(fedsim, three):
    result = fedsim("compare", *three)
    assert (result.code, result.err) == (0, "")
    assert "standard deviation over n finished runs (divisor n - 1)" in result.out
    assert sum("same seed" in line and "too small" in line for line in result.out.splitlines()) == 1
    assert "same seed" not in fedsim("compare", *three[:2]).out


def test_compare_counts_a_folder_once(fedsim, three):
    once, twice = (fedsim("compare", *given).out for given in ([three[0]], [three[0], f"{three[0]}/"]))
    assert once == twice
    assert "±" not in once


@pytest.mark.parametrize("width", [40, 80])
def test_a_comparison_wider_than_the_terminal_is_cut_between_columns(width):
    from rich.console import Console

    rows = [{"run": f"run-{k}", **{f"a setting {i}": f"value {k}.{i}" for i in range(9)}} for k in range(12)]
    console = Console(width=width)
    with console.capture() as captured:
        console.print(looking._fitting(console, rows))
    text = captured.get()
    assert all(value in text for row in rows for value in row.values())
    assert text.count("run-11") > 1
    assert max(map(len, text.splitlines())) <= width
