import pytest

from fedsim import runs
from fedsim.errors import DataError
from fedsim.report import report

HOSTILE = '<script>alert("x")</script>'


@pytest.fixture
def read(parse):
    return lambda folder: parse(report.write(folder).read_text())


def test_the_page_loads_nothing_and_runs_nothing(whole, self_contained):
    self_contained(report.write(whole).read_text())


def test_the_tiles_show_the_numbers_of_the_folder(whole, read):
    tiles, summary = read(whole).tiles, runs.open_run(whole).summary()
    assert float(tiles["Final accuracy"][1]) == summary["final"]["accuracy"]
    assert tiles["Final accuracy"][0] == f"{100 * summary['accuracy']:.2f} %"
    assert float(tiles["Best accuracy"][1]) == summary["best"]["accuracy"]
    assert float(tiles["Final loss"][1]) == summary["loss"]
    assert float(tiles["Rounds to 80 %"][1]) == summary["rounds_to_target"]
    assert tiles["Rounds"] == ("20", "20")
    assert tiles["Clients"] == ("20", "20")
    assert int(tiles["Sent up"][1]) == summary["totals"]["bytes_up"]
    assert tiles["Sent down"][0] == "26.0 MB"
    assert float(tiles["Wall time"][1]) == summary["totals"]["seconds"]
    assert "Epsilon" not in tiles


def test_a_target_that_was_not_reached_is_said(make, read):
    tiles = read(make(made=make.records(20, top=0.6))).tiles
    assert tiles["Rounds to 80 %"] == ("not reached", "")


def test_every_chart_has_a_label_and_a_title(whole, read):
    page = read(whole)
    charts = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(charts) == 8
    assert all(chart["role"] == "img" and chart["aria-label"] for chart in charts)
    assert len([tag for tag, _ in page.tags if tag == "figcaption"]) == 8


def test_no_id_is_used_twice(whole, read):
    ids = [attributes["id"] for _, attributes in read(whole).tags if "id" in attributes]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("status", ["finished", "failed", "interrupted", "running", HOSTILE])
def test_the_badge_says_how_the_run_stands(make, status, read):
    made = make.records(2)
    page = read(make(made=made, with_summary=make.summary(made, status)))
    badge = next(attributes["class"] for _, attributes in page.tags if "badge" in (attributes.get("class") or ""))
    assert badge == f"badge {'other' if status == HOSTILE else status}"
    assert status in page.text
    assert ("had not ended" in page.text) == ("running or killed" in page.text) == (status == "running")


def test_hostile_strings_are_text_wherever_they_come_from(make, self_contained, parse):
    made = make.records(3)
    conf = make.config(name=HOSTILE, data__dataset=HOSTILE, model__init=HOSTILE, model__name=HOSTILE)
    conf[HOSTILE] = HOSTILE
    split = make.split(3) | {"class_names": [HOSTILE] * 10}
    folder = make(conf=conf, made=made, with_split=split, with_summary=make.summary(made, error=HOSTILE))
    runs.write_json(folder / "environment.json", {HOSTILE: {HOSTILE: HOSTILE}})
    html = report.write(folder).read_text()
    self_contained(html)
    assert "<script" not in html
    assert parse(html).text.count(HOSTILE) >= 7


def test_the_config_and_the_environment_are_shown_in_full(whole, read):
    text = read(whole).text
    assert (whole / "config.yaml").read_text().strip() in text
    for key in ("git.commit", "4b745a4", "engine.workers", "Some CPU @ 2.10GHz"):
        assert key in text


def test_two_writes_are_byte_equal(whole):
    first = report.write(whole).read_bytes()
    assert report.write(whole).read_bytes() == first


@pytest.mark.slow
def test_a_thousand_rounds_of_two_hundred_clients_stay_below_three_megabytes(make):
    made = make.records(1000)
    folder = make(made=made, clients=200, with_split=make.split(200), with_summary=make.summary(made))
    assert report.write(folder).stat().st_size < 3_000_000


def test_a_run_without_a_single_round_has_a_page_that_says_what_is_missing(make, self_contained):
    folder = make(made=[])
    for file in ("rounds.jsonl", "clients.jsonl"):
        (folder / file).unlink(missing_ok=True)
    html = report.write(folder).read_text()
    self_contained(html)
    assert "<svg" not in html
    for sentence in (
        "had not ended",
        "No round was finished",
        "the spread over clients is not known",
        "No details of the split",
    ):
        assert sentence in html


@pytest.mark.parametrize("rounds", [1, 2])
def test_short_runs_have_a_page(make, rounds, read):
    page = read(make(made=make.records(rounds)))
    assert len([tag for tag, _ in page.tags if tag == "svg"]) == {1: 1, 2: 6}[rounds]


def test_a_half_written_last_line_is_passed_over(make, read):
    folder = make(made=make.records(3))
    with (folder / "rounds.jsonl").open("a") as file:
        file.write('{"round": 4, "lo')
    assert read(folder).tiles["Rounds"][0] == "3"


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such run folder"):
        report.write(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("centralised", "Baseline: all data in one place."),
        ("alone", "Baseline: every client on its own; loss and accuracy are means over the clients' own models."),
        ("federated", ""),
    ],
)
def test_a_baseline_says_what_it_is(make, read, kind, sentence):
    made = make.records(3)
    text = read(make(made=made, with_summary=make.summary(made, kind=kind))).text
    assert ("Baseline" in text) == bool(sentence)
    assert sentence in text
    assert ("10 in a round" in text) == (kind == "federated")
    assert ("global model" in text) == (kind != "alone")
    assert ("Each client's own model on its own held-out examples." in text) == (kind == "alone")
