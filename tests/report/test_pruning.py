"""What the page of a pruned run shows, against rounds.jsonl and the model by slow counting."""

import dataclasses
import re

import numpy as np
import pytest

from fedsim import runs
from fedsim.errors import DataError
from fedsim.report import pruning, report
from fedsim.report.results import results
from fedsim.wire.sparse import encode

TITLES = ["Sparsity by layer", "Sparsity by round", "Accuracy by weights remaining", "Bytes by round"]


def section(folder, facts=None):
    run = runs.open_run(folder)
    found = run.summary().get("model", {}) if facts is None else facts
    return pruning.pruning(results(run), "lottery-ticket", found, run.model())


def column(table, title):
    return [row[table.columns.index(title)] for row in table.rows]


def test_the_page_has_the_charts_the_facts_and_the_table_and_loads_nothing(pruned, parse, self_contained):
    html = report.write(pruned).read_text()
    self_contained(html)
    page = parse(html)
    for title in [*TITLES, "Every layer"]:
        assert title in page.text
    assert float(page.tiles["Sparsity"][1]) == pytest.approx(1 - 0.8**2)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_a_run_that_prunes_nothing_has_no_word_of_it(whole, parse):
    page = parse(report.write(whole).read_text())
    assert "Sparsity" not in page.tiles
    assert "parsity" not in page.text and "Pruning" not in page.text


def test_a_run_that_is_to_prune_and_has_not_yet_says_so(make):
    conf = make.config() | {"pruning": {"name": "l1-filter", "at": 9}}
    html = report.write(make(conf=conf, made=make.records(3))).read_text()
    assert "l1-filter: no weight has been removed yet." in html
    assert "Sparsity by" not in html


def test_levels_are_the_last_evaluated_round_of_each_sparsity(pruned):
    rounds = runs.open_run(pruned).rounds()
    expected = {}
    for r in rounds:
        if r.accuracy is not None:
            expected[1 - (r.sparsity or 0)] = r.accuracy  # the last one stays
    assert pruning.levels(rounds) == list(expected.items())
    assert len(expected) == 3
    without = [dataclasses.replace(r, accuracy=None) if r.round in (8, *range(9, 13)) else r for r in rounds]
    assert [a for _, a in pruning.levels(without)] == [rounds[3].accuracy, rounds[6].accuracy]


def test_a_return_to_a_sparsity_is_another_level(make):
    sparsity = [0.5, 0.25, 0.5]
    made = [dataclasses.replace(r, sparsity=s) for r, s in zip(make.records(3), sparsity, strict=True)]
    assert [left for left, _ in pruning.levels(made)] == [0.5, 0.75, 0.5]


def test_the_map_has_the_shares_of_the_rounds_and_gaps_stay_as_before(pruned):
    rounds = runs.open_run(pruned).rounds()
    names, sparsity = pruning.by_layer(rounds)
    assert names == ["conv.weight", "fc.weight", "head.weight"]
    for i, name in enumerate(names):
        for j, r in enumerate(rounds):
            assert sparsity[i, j] == pytest.approx(1 - r.remaining.get(name, 1.0), abs=1e-12)
    silent = [dataclasses.replace(r, sparsity=None, remaining={}) if r.round == 6 else r for r in rounds]
    np.testing.assert_array_equal(pruning.by_layer(silent)[1], sparsity)
    assert pruning.known(silent) == pruning.known(rounds) == [r.sparsity or 0.0 for r in rounds]


def test_the_charts_get_the_numbers_of_the_rounds(pruned, monkeypatch):
    drawn = []
    steps = pruning.figures.steps
    monkeypatch.setattr(pruning.figures, "steps", lambda *a, **k: drawn.append((a, k)) or steps(*a, **k))
    made = section(pruned)
    rounds = runs.open_run(pruned).rounds()
    assert [chart.title for chart in made.charts] == TITLES
    assert all(chart.image for chart in made.charts)
    (at, (sparsity,)), _ = drawn[0]
    assert (at, sparsity) == ([r.round for r in rounds], [r.sparsity or 0.0 for r in rounds])
    (_, (up, down)), named = drawn[1]
    assert named["y"] == "sent in a round (MB)"
    assert up == pytest.approx([r.bytes_up / 1e6 for r in rounds])
    assert down == pytest.approx([r.bytes_down / 1e6 for r in rounds])


def test_the_table_counts_what_the_model_holds(pruned):
    table, model, last = section(pruned).table, runs.open_run(pruned).model(), runs.open_run(pruned).rounds()[-1]
    names, uses = ["conv", "fc", "head"], [64, 1, None]
    assert column(table, "layer") == [*names, "total"]
    assert column(table, "shape") == ["4 × 1 × 3 × 3", "8 × 16", "5 × 8", "–"]
    assert "shape at first" not in table.columns
    assert column(table, "remaining")[:3] == [f"{100 * last.remaining[f'{n}.weight']:.2f} %" for n in names]
    entries = [model[f"{n}.weight"].numel() for n in names]
    nonzeros = [sum(v != 0 for v in model[f"{n}.weight"].flatten().tolist()) for n in names]
    told = {"parameters": entries, "non-zeros": nonzeros}
    for title, values in told.items():
        assert [int(cell) for cell in column(table, title)] == [*values, sum(values)]
    macs = [use * count for use, count in zip(uses[:2], nonzeros, strict=False)]
    assert column(table, "effective") == [f"{macs[0]:,}", f"{macs[1]:,}", "–", f"{sum(macs):,}"]
    for form in ("dense", "bitmask", "gaps", "coo"):
        size = len(encode({"head.weight": model["head.weight"]}, forms=(form,))) - 9  # fingerprint and the form's byte
        assert column(table, form)[2] == f"{size} B"


def test_the_facts_hold_what_is_left_against_what_there_was(pruned):
    run, facts = runs.open_run(pruned), dict(section(pruned).facts)
    remaining, entries = run.rounds()[-1].remaining, {"conv.weight": 36, "fc.weight": 128, "head.weight": 40}
    left = round(sum(remaining[name] * count for name, count in entries.items()))
    assert facts["weights remaining"].startswith(f"{left} of 204 (")
    assert facts["parameters remaining"] == "210 of 300 (70.00 %)"
    model = run.model()
    macs = 64 * int((model["conv.weight"] != 0).sum()) + int((model["fc.weight"] != 0).sum())
    assert facts["MACs for one example, without zeros"].startswith(f"{macs:,} of {64 * 36 + 128:,} (")


def test_removed_channels_show_both_shapes(pruned):
    model = runs.open_run(pruned).model()
    runs.save_model(pruned, {**model, "fc.weight": model["fc.weight"][:5]}, {})
    table = section(pruned).table
    assert column(table, "shape at first") == ["4 × 1 × 3 × 3", "8 × 16", "5 × 8", "–"]
    assert column(table, "shape")[1] == "5 × 16"


def test_overlap_has_a_curve_where_clients_have_masks_of_their_own(pruned, make):
    made = [dataclasses.replace(r, overlap=0.5 + r.round / 100) for r in runs.open_run(pruned).rounds()]
    folder = make(made=made)
    runs.save_model(folder, runs.open_run(pruned).model(), {})
    shown = section(folder)
    assert shown.charts[-1].title == "Overlap of masks by round"
    assert "overlap from 51.00 % to 62.00 %" in shown.charts[-1].image
    assert "masks of their own" in shown.lead
    assert "masks of their own" not in section(pruned).lead


def test_an_older_or_broken_off_run_shows_what_its_rounds_say(pruned, make):
    folder = make(made=runs.open_run(pruned).rounds())
    html = report.write(folder).read_text()
    assert all(title in html for title in TITLES)
    assert re.search(r"<td class=\"words\">conv</td><td>64.00 %</td>", html)
    assert "non-zeros" not in html


def test_a_damaged_model_is_named(pruned):
    (pruned / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"model\.safetensors"):
        report.write(pruned)


def test_one_level_is_a_sentence(make):
    made = [dataclasses.replace(r, sparsity=0.5, remaining={"a.weight": 0.5}) for r in make.records(3)]
    charts = {
        chart.title: chart for chart in pruning.pruning(results(runs.open_run(make(made=made))), "x", {}, {}).charts
    }
    assert "Fewer than two levels" in charts["Accuracy by weights remaining"].note


@pytest.mark.slow
def test_a_thousand_rounds_of_twenty_layers_stay_below_three_megabytes(make):
    names = [f"layer{i}.{j}.conv.weight" for i in range(5) for j in range(4)]
    made = make.pruned_records(make.records(1000), names, every=1)
    folder = make(made=made[:1000], with_summary=make.summary(made))
    assert report.write(folder).stat().st_size < 3_000_000
