import dataclasses

from fedsim import runs
from fedsim.report.compare import write
from fedsim.report.groups import compare
from fedsim.report.tables import rows


def test_the_page_is_self_contained_and_has_tables_and_four_overlays(sweep, tmp_path, self_contained):
    html = write(compare(sweep), tmp_path / "new" / "compare.html").read_text()
    self_contained(html)
    assert html.count("<svg ") == 4
    assert "Over seeds" in html
    assert "1 of 7" in html
    assert "same seed" not in html
    assert "(divisor n\u00a0-\u00a01)" in html
    for line in rows(compare(sweep)):
        assert all(f"{cell}</td>" in html for cell in line.values())


def test_runs_with_the_same_seed_are_called_not_independent(make, tmp_path):
    made = make.records(3)
    folders = [runs.open_run(make(made=made, with_summary=make.summary(made))) for _ in range(2)]
    assert "not independent" in write(compare(folders), tmp_path / "c.html").read_text()


def test_hostile_settings_are_text(make, tmp_path, self_contained):
    hostile = "<script>alert(1)</script>"
    folders = [make(conf=make.config(strategy={"name": name}), made=make.records(3)) for name in (hostile, "fedavg")]
    html = write(compare([runs.open_run(folder) for folder in folders]), tmp_path / "c.html").read_text()
    self_contained(html)
    assert "&lt;script&gt;" in html


def test_two_writes_are_byte_equal(sweep, tmp_path):
    first, second = (write(compare(sweep), tmp_path / name).read_bytes() for name in ("a.html", "b.html"))
    assert first == second


def test_runs_without_rounds_can_be_compared(make, tmp_path):
    folders = [runs.open_run(make(made=[])) for _ in range(2)]
    assert "Fewer than two rounds" in write(compare(folders), tmp_path / "c.html").read_text()


def test_groups_have_a_line_in_each_legend_and_a_band_if_two_runs_finished(sweep, parse, tmp_path):
    html = write(compare(sweep), tmp_path / "c.html").read_text()
    for figure in html.split("<figure>")[1:]:
        items = [part.partition("</li>")[0].rpartition(">")[2] for part in figure.split("<li>")[1:]]
        assert items[:3] == ["alpha=0.1, strategy=fedavg (n = 3)", "alpha=1.0, strategy=fedavg (n = 3)", items[2]]
        assert items[2] == "alpha=0.3, strategy=fedprox, mu=0.01"
        assert figure.count("FillBetweenPolyCollection") == 2
        assert "bands of one standard deviation" in figure


def test_what_sent_nothing_is_left_out_of_the_charts_of_traffic_and_named(make, tmp_path):
    made = make.records(4)
    silent = [dataclasses.replace(record, bytes_up=0, bytes_down=0) for record in made]
    folders = [make(conf=make.config("sent"), made=made, with_summary=make.summary(made))]
    folders.append(make(conf=make.config("pooled"), made=silent, with_summary=make.summary(silent, kind="centralised")))
    html = write(compare([runs.open_run(folder) for folder in folders]), tmp_path / "c.html").read_text()
    assert html.count("Sent nothing and are left out: pooled.") == 2
    alone = write(compare([runs.open_run(folders[1])]), tmp_path / "d.html").read_text()
    assert alone.count("Nothing was sent") == 2
    assert "1 run compared" in alone
