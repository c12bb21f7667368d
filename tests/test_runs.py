"""The run folder: whole files or old files, checkpoints that come back bit for bit, damage that is named."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim import params as p
from fedsim import rng, runs
from fedsim.errors import ConfigError, DataError
from fedsim.records import ClientEvaluation, RoundRecord, ServerState

NAN = float("nan")


def record(round, **more):
    fields = {"loss": 0.5, "accuracy": 0.25, "train_loss": 1.5, "clients": 2, "seconds": 0.1, "bytes_up": 9}
    return RoundRecord(round=round, bytes_down=8, **{**fields, **more})


def state(round=3):
    """Names in an order that is not the alphabet's, with dots and slashes, all kinds of tensors."""
    params = {"z.weight": rng.normal(1, 2, 3), "a/b.bias": rng.normal(2, 3), "a": torch.tensor(-0.0)}
    buffers = {"n.count": torch.tensor(7), "mean": torch.tensor([NAN, float("inf")]), "empty": torch.zeros(0, 4)}
    server = {"m/z.weight": rng.normal(3, 2, 3, dtype=torch.float64), "m/a": torch.tensor([True, False])}
    clients = {12: {"c/z.weight": rng.normal(4, 2, 3), "c": torch.ones(1)}, 3: {"7/x": torch.zeros(2).half()}}
    return ServerState(round, params, buffers, server, clients)


def folder(tmp_path):
    made = runs.create(tmp_path, "test")
    runs.write_config(made, {"name": "test", "seed": 1})
    runs.write_json(made / "environment.json", {"host": "here"})
    return made


def append_round(made, of_round, evaluations):
    with contextlib.closing(runs.Lines(made)) as lines:
        lines.add(of_round, evaluations)


def same_state(a, b):
    for group in ("params", "buffers", "server"):
        one, other = getattr(a, group), getattr(b, group)
        assert list(one) == list(other) and p.same_bits(one, other)
    assert a.round == b.round and a.clients.keys() == b.clients.keys()
    for client, own in a.clients.items():
        assert list(own) == list(b.clients[client]) and p.same_bits(own, b.clients[client])


# ---------------------------------------------------------------- new folders


def test_run_folders_are_numbered(tmp_path):
    names = [runs.create(tmp_path / "runs", name).name for name in ("a", "a", "b", "a")]
    assert [name.rpartition("-")[2] for name in names] == ["1", "2", "1", "3"]
    assert names[0].startswith("a-20")


def test_many_that_start_at_once_get_different_folders(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: runs.create(tmp_path, "run"), range(40)))
    assert len(set(made)) == 40


def test_two_processes_that_start_at_once_get_different_folders(tmp_path):
    code = (
        "import sys, pathlib; from fedsim import runs; print('ready', flush=True); sys.stdin.readline();"
        "[print(runs.create(pathlib.Path(sys.argv[1]), 'run').name) for _ in range(100)]"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    both = [subprocess.Popen(command, stdin=-1, stdout=-1, text=True) for _ in range(2)]
    for one in both:
        assert one.stdout.readline() == "ready\n"
    for one in both:
        one.stdin.write("go\n")
        one.stdin.flush()
    names = [name for one in both for name in one.communicate()[0].split()]
    assert len(names) == len(set(names)) == len(list(tmp_path.iterdir())) == 200


def test_an_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"output: cannot make a run folder in .*file: File exists"):
        runs.create(tmp_path / "file", "run")


# ---------------------------------------------------------------- atomic files


@pytest.mark.parametrize("where", ["pathlib.Path.replace", "os.fsync"])
def test_a_crash_while_a_file_is_replaced_leaves_the_old_one_and_nothing_else(tmp_path, monkeypatch, where):
    path = tmp_path / "deep" / "summary.json"
    runs.write_bytes(path, b"old")

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(where, crash)
    with pytest.raises(KeyboardInterrupt):
        runs.write_bytes(path, b"new and longer")
    monkeypatch.undo()
    assert path.read_bytes() == b"old" and [f.name for f in path.parent.iterdir()] == ["summary.json"]
    runs.write_bytes(path, b"new")
    assert path.read_bytes() == b"new"


def test_json_holds_null_for_what_it_cannot_hold(tmp_path):
    runs.write_json(tmp_path / "x.json", {"a": NAN, "b": [float("inf"), {"c": -float("inf")}], "d": 1.5, 3: "ü"})
    content = {"a": None, "b": [None, {"c": None}], "d": 1.5, "3": "ü"}
    assert json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail) == content


# ---------------------------------------------------------------- the two growing files


def test_rounds_and_clients_come_back_as_they_went(tmp_path):
    made = folder(tmp_path)
    records = [record(1, skipped=(3, 5)), record(2, loss=None, accuracy=None, epsilon=2.5)]
    evaluations = [ClientEvaluation(1, 0, 5, 0.1, 1 / 3), ClientEvaluation(1, 4, 2, 0.2, 0.5)]
    append_round(made, records[0], evaluations)
    append_round(made, records[1], [])
    opened = runs.open_run(made)
    assert opened.rounds() == records and opened.clients() == evaluations
    assert len((made / "rounds.jsonl").read_text().splitlines()) == 2


def test_a_number_that_is_not_finite_becomes_none(tmp_path):
    made = folder(tmp_path)
    append_round(made, record(1, loss=float("inf"), train_loss=NAN), [ClientEvaluation(1, 0, 2, -float("inf"), 0.5)])
    assert runs.open_run(made).rounds() == [record(1, loss=None, train_loss=None)]
    assert runs.open_run(made).clients() == [ClientEvaluation(1, 0, 2, None, 0.5)]


def test_lines_can_be_read_as_soon_as_they_are_added(tmp_path):
    made = folder(tmp_path)
    with contextlib.closing(runs.Lines(made)) as lines:
        for round in (1, 2, 3):
            lines.add(record(round), [ClientEvaluation(round, client, 1, 0.5, 0.5) for client in range(round)])
            opened = runs.open_run(made)
            assert [r.round for r in opened.rounds()] == [*range(1, round + 1)]
            assert [e.round for e in opened.clients()] == [r for r in range(1, round + 1) for _ in range(r)]


def test_adding_lines_does_not_wait_for_the_disk_but_sync_does_for_both_files(tmp_path, monkeypatch):
    made, real, synced = folder(tmp_path), os.fsync, []
    with contextlib.closing(runs.Lines(made)) as lines:
        monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.fstat(file).st_ino), real(file)))
        lines.add(record(1), [ClientEvaluation(1, 0, 1, 0.5, 0.5)])
        assert synced == []
        lines.sync()
    assert sorted(synced) == sorted((made / name).stat().st_ino for name in ("rounds.jsonl", "clients.jsonl"))


def test_whoever_finds_a_round_finds_its_clients(tmp_path):
    made = folder(tmp_path)
    (made / "clients.jsonl").symlink_to("/dev/full")
    lines = runs.Lines(made)
    for what in (lambda: lines.add(record(1), [ClientEvaluation(1, 0, 1, 0.5, 0.5)]), lines.close):
        with pytest.raises(OSError, match="No space left"):
            what()
    assert runs.open_run(made).rounds() == []


@pytest.mark.parametrize("full", ["rounds.jsonl", "clients.jsonl"])
def test_lines_that_find_no_room_are_an_error_and_both_files_are_closed(tmp_path, full):
    made = folder(tmp_path)
    (made / full).symlink_to("/dev/full")
    lines = runs.Lines(made)
    files = (lines._clients, lines._rounds)
    for what in (lambda: lines.add(record(1), [ClientEvaluation(1, 0, 1, 0.5, 0.5)]), lines.close):
        with pytest.raises(OSError, match="No space left"):
            what()
    assert all(file.closed for file in files)


@given(st.integers(0, 400))
@settings(deadline=None, max_examples=60)
def test_a_file_cut_off_anywhere_reads_as_its_whole_lines(tmp_path_factory, cut):
    made = folder(tmp_path_factory.mktemp("run"))
    for round in (1, 2, 3):
        append_round(made, record(round), [ClientEvaluation(round, 0, 1, 0.5, 0.5)])
    path = made / "rounds.jsonl"
    left = path.read_bytes()[: -1 - cut]
    path.write_bytes(left)
    whole = left.count(b"\n")
    assert [r.round for r in runs.open_run(made).rounds()] == [1, 2, 3][:whole]
    kept = [1, 2][:whole]
    runs.trim(made, len(kept))
    assert [r.round for r in runs.open_run(made).rounds()] == kept
    assert [e.round for e in runs.open_run(made).clients()] == kept
    with pytest.raises(DataError, match=rf"holds {len(kept)} rounds, the checkpoint is of round 3"):
        runs.trim(made, 3)
    append_round(made, record(3), [])  # what is added next starts on a line of its own
    assert [r.round for r in runs.open_run(made).rounds()] == [*kept, 3]


def test_trim_drops_later_rounds_and_makes_no_files(tmp_path):
    made = folder(tmp_path)
    runs.trim(made, 0)
    assert not (made / "rounds.jsonl").exists()
    append_round(made, record(1), [])
    runs.trim(made, 0)
    assert runs.open_run(made).rounds() == []


@pytest.mark.parametrize("name", ["rounds.jsonl", "clients.jsonl"])
@pytest.mark.parametrize("line", ["{", "5", "null", '{"round": 1}', '{"round": 1, "x": 2}', "\xff"], ids=ascii)
def test_a_damaged_line_is_named(tmp_path, name, line):
    made = folder(tmp_path)
    (made / name).write_bytes(line.encode("latin-1") + b"\n")
    opened = runs.open_run(made)
    with pytest.raises(DataError, match=rf"{name}: not one (RoundRecord|ClientEvaluation) per line"):
        opened.rounds() if name == "rounds.jsonl" else opened.clients()


# ---------------------------------------------------------------- checkpoints


def test_a_checkpoint_comes_back_bit_for_bit_and_in_order(tmp_path):
    made, saved = folder(tmp_path), state()
    runs.save_checkpoint(made, saved)
    same_state(runs.load_checkpoint(made), saved)


def test_only_the_last_checkpoint_is_kept(tmp_path):
    made = folder(tmp_path)
    for round in (1, 2, 3):
        runs.save_checkpoint(made, state(round))
    assert sorted(f.name for f in (made / "checkpoint").iterdir()) == ["state-000003.safetensors", "state.json"]


def test_states_that_share_one_tensor_are_saved(tmp_path):
    shared, made = torch.arange(3.0), folder(tmp_path)
    saved = ServerState(1, {"w": shared}, {}, {"m": shared}, {k: {"c": shared} for k in range(3)})
    runs.save_checkpoint(made, saved)
    same_state(runs.load_checkpoint(made), saved)


@pytest.mark.parametrize("broken", ["tensors", "facts"])
def test_a_crash_while_a_checkpoint_is_written_leaves_the_last_one(tmp_path, monkeypatch, broken):
    made, whole = folder(tmp_path), runs.write_bytes
    runs.save_checkpoint(made, state(1))

    def crash(path, data):
        if path.name.endswith(".json") == (broken == "facts"):
            raise OSError("disk full")
        whole(path, data)

    monkeypatch.setattr(runs, "write_bytes", crash)
    with pytest.raises(OSError, match="disk full"):
        runs.save_checkpoint(made, state(2))
    monkeypatch.undo()
    same_state(runs.load_checkpoint(made), state(1))


def tensors_file(made):
    return next((made / "checkpoint").glob("state-*.safetensors"))


def test_a_missing_checkpoint_is_named(tmp_path):
    made = folder(tmp_path)
    with pytest.raises(DataError, match=r"checkpoint/state\.json: missing"):
        runs.load_checkpoint(made)
    runs.save_checkpoint(made, state())
    tensors_file(made).unlink()
    with pytest.raises(DataError, match=r"state-000003\.safetensors: missing"):
        runs.load_checkpoint(made)


def test_a_truncated_checkpoint_is_named(tmp_path):
    made = folder(tmp_path)
    runs.save_checkpoint(made, state())
    path = tensors_file(made)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-5])
    wanted = rf"state-000003\.safetensors: truncated checkpoint, {size - 5} bytes where {size} were written"
    with pytest.raises(DataError, match=wanted):
        runs.load_checkpoint(made)


def test_a_flipped_bit_in_a_checkpoint_is_noticed(tmp_path):
    made = folder(tmp_path)
    runs.save_checkpoint(made, state())
    path = tensors_file(made)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"state-000003\.safetensors: damaged checkpoint, its sha256 is not"):
        runs.load_checkpoint(made)


@pytest.mark.parametrize("field", ["file", "round", "bytes", "sha256", "order"])
def test_a_checkpoint_without_one_of_its_facts_is_named(tmp_path, field):
    made = folder(tmp_path)
    runs.save_checkpoint(made, state())
    path = made / "checkpoint" / "state.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in facts.items() if k != field}))
    with pytest.raises(DataError, match=rf"state\.json: damaged checkpoint, field '{field}' is missing"):
        runs.load_checkpoint(made)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"round": "x"}, r"state\.json: damaged checkpoint"),
        ({"order": None}, r"state\.json: damaged checkpoint"),
        ({"order": ["params/a"]}, r"state-000003\.safetensors: does not hold the tensors that"),
    ],
)
def test_a_checkpoint_with_a_wrong_fact_is_named(tmp_path, change, message):
    made = folder(tmp_path)
    runs.save_checkpoint(made, state())
    path = made / "checkpoint" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(DataError, match=message):
        runs.load_checkpoint(made)


# ---------------------------------------------------------------- opening


def test_what_is_not_a_run_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: no such run folder"):
        runs.open_run(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"not a run folder \(it has no config\.yaml\)"):
        runs.open_run(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match=r"file: no such run folder"):
        runs.open_run(tmp_path / "file")


@pytest.mark.parametrize("name", ["summary.json", "checkpoint/state.json"])
def test_a_folder_of_a_newer_version_is_refused(tmp_path, name):
    made = folder(tmp_path)
    runs.write_json(made / name, {"format": runs.FORMAT + 1})
    with pytest.raises(DataError, match=rf"{name}: run folder format 2 is newer than this fedsim reads \(1\)"):
        runs.open_run(made)


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe"])
def test_a_damaged_summary_is_named(tmp_path, content):
    made = folder(tmp_path)
    (made / "summary.json").write_bytes(content)
    with pytest.raises(DataError, match=r"summary\.json: (not whole JSON|expected a JSON object)"):
        runs.open_run(made)


@pytest.mark.parametrize("content", [b"a: [", b"- 1", b"", b"\xff\xfe\xff"])
def test_a_damaged_config_is_named(tmp_path, content):
    made = folder(tmp_path)
    (made / "config.yaml").write_bytes(content)
    with pytest.raises(DataError, match=r"config\.yaml: (not whole YAML|expected a mapping)"):
        runs.open_run(made).config()


def test_an_unfinished_run_has_empty_parts_and_the_model_of_its_checkpoint(tmp_path):
    made = folder(tmp_path)
    opened = runs.open_run(made)
    assert (opened.summary(), opened.split()) == ({}, {})
    assert (opened.rounds(), opened.clients()) == ([], [])
    runs.save_checkpoint(made, state())
    saved = state()
    assert p.same_bits(opened.model(), {**saved.params, **saved.buffers})


def test_the_final_model_comes_back(tmp_path):
    made, saved = folder(tmp_path), state()
    runs.save_model(made, saved.params, saved.buffers)
    assert p.same_bits(runs.open_run(made).model(), {**saved.params, **saved.buffers})
    (made / "model.safetensors").write_bytes(b"short")
    with pytest.raises(DataError, match=r"model\.safetensors: not a whole safetensors file"):
        runs.open_run(made).model()


def test_every_field_of_a_record_is_in_its_line(tmp_path):
    made = folder(tmp_path)
    append_round(made, record(1), [])
    line = json.loads(Path(made / "rounds.jsonl").read_text())
    assert list(line) == [field.name for field in dataclasses.fields(RoundRecord)]
