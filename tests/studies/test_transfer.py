"""The study of transfer: its tables, its arithmetic, and a fast part of it from beginning to end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from at_study import at_study

from fedsim.config import load

STUDY = Path(__file__).parents[2] / "studies" / "transfer"
NAMES = ("claims", "cost_page", "costs", "experiments", "page", "plots", "small_pictures", "tables")


@pytest.fixture(scope="module", autouse=True)
def at_the_study():
    with at_study("transfer", NAMES):
        yield


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    from tables import Place, tables

    place = Place("synthetic", 3, {"transfer.iterations": 2}, tmp_path_factory.mktemp("runs"))
    return place, tables(place)


def row(experiment="overlap", arm="20 labelled", seed=1, accuracy=0.5, **more):
    return {"experiment": experiment, "data": "digits", "seed": seed, "arm": arm, "accuracy": accuracy, **more}


def cost(protocol, overlap, seconds, nets="x", **more):
    known = {
        "experiment": "costs",
        "protocol": protocol,
        "overlap": overlap,
        "hidden": 16,
        "key_bits": 2048,
        "triples": "helper",
    }
    return {**known, "trains": "linear", "seconds": seconds, "nets": nets, **more}


def test_common_rows_are_the_same_people_at_both_parties_in_the_order_of_training(drawn):
    from fedsim.config import parties
    from fedsim.transfer.party import _aligned

    place, found = drawn
    a, b = found.common
    names = [[table.ids[row] for row in rows.tolist()] for table, rows in ((found.sides.a, a), (found.sides.b, b))]
    assert names[0] == names[1] and len(set(names[0])) == 200
    config = place.config(transfer__overlap=20, transfer__labelled=10)
    ends = _both_aligned(parties.agreed(config), [parties.party(config, role, found.sides) for role in "ab"], _aligned)
    assert torch.equal(ends[0].inputs[:20], found.sides.a.inputs[a[:20]])
    assert torch.equal(ends[1].inputs, found.sides.b.inputs[b[:20]])


def _both_aligned(agreed, sides, aligned):
    from concurrent.futures import ThreadPoolExecutor

    from fedsim.transfer.channel import Channel
    from fedsim.transfer.links import pair

    channels = [Channel(link, "the other") for link in pair()]
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(aligned, side, agreed, end) for side, end in zip(sides, channels, strict=True)]
        return [one.result(10) for one in asked]


def test_columns_of_a_that_are_held_out_belong_to_the_people_that_b_asks_about(drawn):
    """The synthetic columns of both parties come of five factors, so A's predict B's well, in the same order only."""
    _, found = drawn
    x, y = found.held_out_a, found.sides.held_out.inputs
    residual = y - x @ torch.linalg.lstsq(x, y).solution
    shuffled = y - (other := x[torch.randperm(len(x), generator=torch.Generator().manual_seed(1))]) @ (
        torch.linalg.lstsq(other, y).solution
    )
    assert len(x) == 1000 and residual.square().mean() < 0.6 * shuffled.square().mean()


def test_columns_of_a_that_are_held_out_are_the_other_half_of_the_same_pictures(tmp_path):
    from tables import Place, tables

    from fedsim.data.datasets import DATASETS

    found = tables(Place("digits", 1, {}, tmp_path))
    both = torch.cat([found.held_out_a, found.sides.held_out.inputs], -1).flatten(1)
    whole = DATASETS["digits"]().train.inputs.flatten(1)
    assert all(bool((whole == one).all(1).any()) for one in both[:50])


def test_a_regression_of_one_class_says_that_class_and_another_one_learns(drawn):
    from tables import _fitted, majority

    x = torch.tensor([[-2.0], [-1.0], [1.0], [3.0]])
    y = torch.tensor([-1, -1, 1, 1])
    assert _fitted(x, y, torch.tensor([[-5.0], [5.0], [4.0]]), torch.tensor([-1, 1, -1])) == pytest.approx(2 / 3)
    assert _fitted(x[:2], y[:2], x, torch.tensor([-1, 1, 1, 1])) == 0.25
    ring = torch.tensor([[-2.0, 0], [2, 0], [0, 2], [0, -2], [0.2, 0], [-0.2, 0], [0, 0.2], [0, -0.2]])
    inside = torch.tensor([-1, -1, -1, -1, 1, 1, 1, 1])
    assert _fitted(ring, inside, ring, inside) < 1.0 == _fitted(ring, inside, ring, inside, net_of_seed=1)
    truth = drawn[1].sides.held_out.labels
    assert majority(drawn[1]) == max((truth > 0).double().mean(), (truth < 0).double().mean()) >= 0.5


def test_differences_are_between_runs_of_one_seed_with_the_margin_or_the_distance_taken_off():
    from claims import Claim, findings

    def is_arm(arm):
        return lambda r: r["arm"] == arm

    rows = [row(arm="a", seed=1, accuracy=0.5), row(arm="b", seed=1, accuracy=0.4), row(arm="a", seed=2, accuracy=0.7)]
    rows += [row(arm="b", seed=3, accuracy=0.1), {**row(arm="b", seed=2, accuracy=0.9), "data": "fashion"}]
    claims = [
        Claim("", "overlap", is_arm("a"), is_arm("b"), 2.0),
        Claim("", "overlap", is_arm("b"), is_arm("a"), 2.0, True),
    ]
    one_sided, distance = findings(rows, claims)
    assert one_sided.data == "digits" and one_sided.differences == pytest.approx([12.0])
    assert distance.differences == pytest.approx([-8.0])


def test_every_claim_is_about_rows_that_the_experiments_make():
    from claims import CLAIMS
    from experiments import EXPERIMENTS, LABELLED, NETS, OVERLAPS

    made = [row("overlap", arm, overlap=n) for arm in ("20 labelled", "all labelled") for n in OVERLAPS]
    made += [row("labelled", arm, labelled=n) for arm in ("transfer", "B alone", "B alone, a net") for n in LABELLED]
    made += [row("loss", arm) for arm in ("taylor", "exact")] + [row("nets", arm) for arm in NETS]
    made += [row("start", arm, trains=t) for arm in ("new", "source run") for t in ("all", "head")]
    made += [row("same", f"adam, {protocol}") for protocol in ("plain", "secret-sharing")]
    assert {claim.experiment for claim in CLAIMS} <= set(EXPERIMENTS)
    for claim in CLAIMS:
        own = [r for r in made if r["experiment"] == claim.experiment]
        assert sum(map(claim.better, own)) == sum(map(claim.worse, own)) == 1, claim.statement


def test_ciphertexts_of_the_paper_are_counted_by_hand():
    """Three labelled of 6 people, 2 hidden values: 18 of squares and halves, 12 of people, each way; 64 parameters."""
    from costs import Cell, in_the_paper

    assert in_the_paper(Cell("paillier", overlap=6, hidden=2)) == 2 * (3 * (4 + 2) + 6 * 2) + 1 + 2 * 16 * 2 + 1


def test_costs_are_held_against_what_was_asked_of_them():
    from cost_page import _asked, _same_bits

    rows = [cost("paillier", n, seconds) for n, seconds in ((50, 1.0), (100, 2.0), (200, 5.0))]
    rows += [cost("secret-sharing", n, 0.5, online=0.01, nets=nets) for n, nets in ((50, "x"), (100, "y"))]
    (_, doubled, in_range), _, (_, online, enough), (_, whole, _) = _asked(rows)
    assert doubled == [2.0, 2.5] and [in_range(one) for one in doubled] == [True, False]
    assert online == pytest.approx([100, 200]) and enough(50) and not enough(49.9) and whole == [2.0, 4.0]
    assert _same_bits(rows).startswith("In 1 of 2 settings")


def test_of_two_measurements_the_faster_numbers_stay():
    from costs import faster

    one = cost("secret-sharing", 50, 3.0, online=0.1, load=[1.0])
    two = cost("secret-sharing", 50, 2.0, online=0.2, load=[7.0])
    expected = {"seconds": 2.0, "online": 0.1, "load": [1.0, 7.0]}
    assert faster(one, two) == {**one, **expected}
    with pytest.raises(ValueError, match="otherwise"):
        faster(one, {**two, "nets": "y"})


def test_a_wrong_count_of_ciphertexts_stops_the_study():
    from costs import Cell, _counted

    cell = Cell("paillier", overlap=50, hidden=4)
    sent = {"secrets": 54 + 1, "masked": 4}
    with pytest.raises(ValueError, match="party a sent"):
        _counted(cell, {f"counted_by_{role}": {"ciphertexts": sent} for role in "ab"}, 1)


def test_the_configs_of_the_study_are_right():
    for path in STUDY.glob("*.yaml"):
        load.load(path)


@pytest.mark.slow
def test_a_fast_part_of_the_study_runs_and_is_not_run_twice(tmp_path):
    out, page = tmp_path / "results", tmp_path / "page"
    command = [sys.executable, str(STUDY / "study.py"), "--fast", "--out", str(out), "--page", str(page)]
    subprocess.run(command, check=True, timeout=600)
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert {r["experiment"] for r in rows} == {"overlap", "labelled", "loss", "nets", "start", "same", "costs"}
    assert all(0.2 < r["accuracy"] <= 1 for r in rows if "accuracy" in r)
    assert all(r["different"] == 0 for r in rows if r["experiment"] == "same")
    costs = [r for r in rows if r["experiment"] == "costs"]
    assert len({r["nets"] for r in costs}) == 1 and {r["protocol"] for r in costs} == {"paillier", "secret-sharing"}
    assert "**" in (page / "transfer.md").read_text()
    assert {file.name for file in page.glob("*.svg")} == {"transfer-overlap.svg", "transfer-labelled.svg"}
    subprocess.run(command, check=True, timeout=120)
    assert json.loads((out / "results.json").read_text())["rows"] == rows
