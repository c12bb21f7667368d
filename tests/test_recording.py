"""How a run ends shows in its folder, whatever ended it, and how much a run that is killed has to repeat."""

import contextlib
import itertools
import json
import sys
import tracemalloc
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim import params as p
from fedsim import runs
from fedsim.data.federated import FederatedData
from fedsim.errors import ClientError, RunError
from fedsim.federation import RoundResult
from fedsim.recording import (
    SPLIT_DETAIL_CLIENTS,
    Facts,
    Recording,
    Weight,
    Written,
    due,
    record_rounds,
    split_facts,
)
from fedsim.records import ClientEvaluation, Examples, Partition, RoundRecord, ServerState

FACTS = Facts("test", "federated", "mlp", 12, 5, (1, 8, 8), 10, 4, 0.5)


def state(round):
    return ServerState(round, {"w": torch.full((2,), float(round))}, {})


def result(round, accuracy=0.25, cohort=()):
    record = RoundRecord(round, 1 - accuracy, accuracy, None, 2, 0.1, 5, 6, cohort=cohort)
    return RoundResult(state(round), record, (ClientEvaluation(round, 0, 3, 0.5, 0.5),))


class Clock:
    """Time that passes when it is told to, in s."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def folder(tmp_path):
    return new_folder(tmp_path)


def new_folder(where):
    made = runs.create(where, "test")
    runs.write_config(made, {"name": "test"})
    runs.write_json(made / "environment.json", {"host": "here"})
    return made


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def ignore(record):
    pass


def recorded(folder, *rounds, on_round=ignore, error=None, clock=None):
    """Record these rounds, going on from the one before; no time passes unless the clock says so."""
    with Recording(folder, FACTS, state(max(rounds[0] - 1, 0)), on_round, clock or Clock()) as recording:
        recording.save()
        for round in rounds:
            recording.take(result(round, round / 10))
        if error is not None:
            raise error


@pytest.mark.parametrize(
    ("now", "remaining", "left"),
    [((4, 6), {}, 24 + 4), ((4, 6), {"a": 0.25}, 6 + 4), ((3, 5), {"a": 0.625}, 15 + 3), ((4, 6), {"a": 1.0}, 24 + 4)],
)
def test_what_is_left_of_a_model_counts_masks_and_removed_channels(folder, now, remaining, left):
    facts = replace(FACTS, parameters=28, weights={"a": Weight((4, 6), 9)})
    record = RoundRecord(1, 0.5, 0.5, None, 2, 0.1, 5, 6, sparsity=0.5 if remaining else None, remaining=remaining)
    params = {"a": torch.ones(now), "b": torch.ones(now[0])}
    with Recording(folder, facts, state(0), ignore, Clock()) as recording:
        recording.take(RoundResult(ServerState(1, params, {}), record, ()))
    found = summary(folder)
    assert (found["model"]["parameters"], found["model"]["parameters_left"]) == (28, left)
    assert found["model"]["weights"] == {"a": {"shape": [4, 6], "uses": 9}}
    assert found.get("remaining", {}) == remaining


def test_a_whole_run_is_finished_with_its_model_and_summary(folder):
    told = []
    recorded(folder, 0, 1, 2, on_round=told.append)
    assert [record.round for record in told] == [1, 2]
    found = summary(folder)
    assert (found["status"], found["error"], found["format"], found["name"]) == ("finished", None, 1, "test")
    assert found["initial"] == {"round": 0, "loss": 1.0, "accuracy": 0.0}
    assert (found["accuracy"], found["rounds"], found["rounds_done"]) == (0.2, 4, 2)
    assert found["model"] == {"name": "mlp", "parameters": 12, "input_shape": [1, 8, 8], "num_classes": 10}
    assert (found["clients"], found["target_accuracy"], found["rounds_to_target"]) == (5, 0.5, None)
    opened = runs.open_run(folder)
    assert p.same_bits(opened.model(), {"w": torch.tensor([2.0, 2.0])})
    assert [record.round for record in opened.rounds()] == [e.round for e in opened.clients()] == [1, 2]


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (KeyboardInterrupt(), "interrupted", None),
        (ClientError(2, 7, "training diverged"), "failed", "round 2, client 7: training diverged"),
        (ZeroDivisionError("oops"), "failed", "ZeroDivisionError: oops"),
        (ConnectionResetError("engine lost"), "failed", "ConnectionResetError: engine lost"),
        (SystemExit(3), "failed", "SystemExit: 3"),
    ],
)
def test_whatever_ends_a_run_early_is_in_the_summary_and_goes_on_up(folder, error, status, said):
    with pytest.raises(type(error)) as raised:
        recorded(folder, 0, 1, error=error)
    assert raised.value is error
    found = summary(folder)
    assert (found["status"], found["error"], found["rounds_done"]) == (status, said, 1)
    assert not (folder / "model.safetensors").exists()
    assert runs.load_checkpoint(folder).round == 1


def test_a_folder_says_running_while_it_runs_also_the_second_time(folder):
    seen = []
    with pytest.raises(KeyboardInterrupt):
        recorded(
            folder, 0, 1, on_round=lambda record: seen.append(summary(folder)["status"]), error=KeyboardInterrupt()
        )
    recorded(folder, 2, on_round=lambda record: seen.append(summary(folder)["status"]))
    assert seen == ["running", "running"]


def test_a_folder_with_rounds_is_continued(folder):
    with pytest.raises(KeyboardInterrupt):
        recorded(folder, 0, 1, error=KeyboardInterrupt())
    recorded(folder, 2, 3)
    found = summary(folder)
    assert (found["status"], found["rounds_done"], found["initial"]["accuracy"]) == ("finished", 3, 0.0)
    assert found["totals"]["bytes_up"] == 15


@pytest.mark.parametrize(("where", "broken"), [(runs.Lines, "add"), (runs, "save_checkpoint"), (runs, "save_model")])
def test_a_full_disk_is_a_run_error_that_names_the_folder(folder, monkeypatch, where, broken):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(where, broken, full)
    with pytest.raises(RunError, match=rf"{folder.name}: cannot be written: No space left on device"):
        recorded(folder, 0, 1)


@pytest.mark.parametrize("full_file", ["rounds.jsonl", "clients.jsonl"])
def test_a_disk_without_room_for_a_line_leaves_the_round_before(folder, monkeypatch, full_file):
    recording = Recording(folder, FACTS, state(0), ignore, Clock())
    (folder / full_file).symlink_to("/dev/full")  # not to be read: it never ends
    monkeypatch.setattr(runs.Lines, "sync", lambda self: None)  # which a device does not have
    with pytest.raises(RunError, match="cannot be written: No space left on device"), recording:
        recording.save()
        recording.take(result(1))
    assert (summary(folder)["status"], summary(folder)["rounds_done"]) == ("failed", 0)
    assert runs.load_checkpoint(folder).round == 0


def test_a_disk_that_stays_full_still_lets_the_first_error_through(folder, monkeypatch):
    error = ClientError(1, 2, "diverged")

    def full(*_):
        raise OSError(28, "No space left on device")

    with pytest.raises(ClientError), Recording(folder, FACTS, state(0), ignore) as recording:
        recording.save()
        recording.take(result(1))
        monkeypatch.setattr(runs, "write_bytes", full)
        raise error
    assert runs.load_checkpoint(folder).round == 0  # the last that there was room for


def test_a_checkpoint_that_finds_no_room_does_not_keep_the_summary_from_saying_so(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with pytest.raises(ClientError), Recording(folder, FACTS, state(0), ignore) as recording:
        recording.save()
        recording.take(result(1))
        monkeypatch.setattr(runs, "save_checkpoint", full)
        raise ClientError(2, 3, "diverged")
    assert (summary(folder)["status"], summary(folder)["error"]) == ("failed", "round 2, client 3: diverged")


# ---------------------------------------------------------------- what is on the disk, and when


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ClientError(4, 7, "diverged"), None], ids=repr)
def test_however_a_run_ends_its_last_whole_round_is_saved(folder, error):
    """No time passes, so no checkpoint was due in between."""

    def told(record):
        assert runs.load_checkpoint(folder).round == 0
        assert [r.round for r in runs.open_run(folder).rounds()] == list(range(1, record.round + 1))

    try:
        recorded(folder, 0, 1, 2, 3, on_round=told, error=error)
    except (KeyboardInterrupt, ClientError) as raised:
        assert raised is error
    saved = runs.load_checkpoint(folder)
    assert saved.round == summary(folder)["rounds_done"] == 3
    assert p.same_bits(saved.params, state(3).params)


def test_a_listener_that_breaks_loses_nothing(folder):
    def told(record):
        raise BrokenPipeError("nobody listens")

    with pytest.raises(BrokenPipeError):
        recorded(folder, 0, 1, on_round=told)
    assert runs.load_checkpoint(folder).round == summary(folder)["rounds_done"] == 1
    assert summary(folder)["status"] == "failed"


def signal_at(line, call):
    """Call it, and raise KeyboardInterrupt when it has come to so many lines of fedsim's; say whether it has."""
    left = [line]

    def trace(frame, event, _):
        if not frame.f_code.co_filename.startswith(str(Path(runs.__file__).parent)):
            return None
        left[0] -= event == "line"
        if left[0] == 0:
            left[0] = -1
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return left[0] < 0


@pytest.mark.parametrize("seconds", [0, 2], ids=["lines", "lines and checkpoint"])
def test_a_signal_at_any_line_of_the_code_leaves_a_whole_round(tmp_path, monkeypatch, seconds):
    """While round 2 is taken: its lines, what is in memory, its checkpoint if one is due, and who is told."""
    monkeypatch.setattr("os.fsync", lambda file: None)
    rounds = set()
    for line in itertools.count(1):
        folder, clock, came = new_folder(tmp_path), Clock(), True
        with contextlib.suppress(KeyboardInterrupt), Recording(folder, FACTS, state(0), ignore, clock) as recording:
            recording.save()
            recording.take(result(1))
            clock.now = seconds
            came = signal_at(line, lambda recording=recording: recording.take(result(2)))
        if not came:
            break
        saved = runs.load_checkpoint(folder)
        rounds.add(saved.round)
        assert (summary(folder)["status"], summary(folder)["rounds_done"]) == ("interrupted", saved.round)
        assert p.same_bits(saved.params, state(saved.round).params)
        runs.trim(folder, saved.round)  # which refuses a folder that lacks lines
    assert line > 15 and rounds == {1, 2}


def test_lines_reach_the_disk_before_the_checkpoint_that_makes_them_count(folder, monkeypatch):
    steps = []

    def noted(name, real):
        return lambda *args: (steps.append(name), real(*args))[1]

    for where, name in ((runs.Lines, "add"), (runs.Lines, "sync"), (runs, "save_checkpoint")):
        monkeypatch.setattr(where, name, noted(name, getattr(where, name)))
    recorded(folder, 0, 1, 2)
    assert steps == ["sync", "save_checkpoint", "add", "add", "sync", "save_checkpoint"]


def test_a_checkpoint_that_is_there_is_not_written_again(folder, monkeypatch):
    clock, real, saved = Clock(), runs.save_checkpoint, []
    monkeypatch.setattr(runs, "save_checkpoint", lambda where, what: (saved.append(what.round), real(where, what)))
    with Recording(folder, FACTS, state(0), ignore, clock) as recording:
        recording.save()
        for round in (1, 2):
            recording.take(result(round))
            clock.now += 1
        recording.take(result(3))
    assert saved == [0, 2, 3]


def test_both_files_are_closed_in_the_end(folder):
    with Recording(folder, FACTS, state(0), ignore) as recording:
        recording.take(result(1))
    with pytest.raises(ValueError, match="closed file"):
        recording.lines.add(result(2).record, ())


# ---------------------------------------------------------------- how often


@pytest.mark.parametrize(
    ("took", "since", "expected"),
    [
        (0.0, 0.99, False),
        (0.0, 1.0, True),
        (0.04, 1.0, True),
        (0.06, 1.19, False),
        (0.06, 1.21, True),
        (3.0, 59.9, False),
        (3.0, 60.0, True),
    ],
)
def test_a_checkpoint_is_due_after_a_second_or_twenty_times_what_the_last_one_took(took, since, expected):
    assert due(Written(100 - took, 100), 100 + since) is expected


@given(st.lists(st.tuples(st.floats(0.001, 9), st.floats(0.001, 3)), min_size=1, max_size=40))
@settings(deadline=None, max_examples=40)
def test_checkpoints_cost_a_twentieth_and_a_kill_costs_little_work(tmp_path_factory, lengths):
    """A round takes the first number of seconds, a checkpoint written in it the second."""
    folder, clock, written, round_s = new_folder(tmp_path_factory.mktemp("run")), Clock(), [], []

    def write(folder, state):
        began = clock.now
        clock.now += lengths[state.round - 1][1]
        written.append((began, clock.now))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(runs, "save_checkpoint", write)
        with Recording(folder, FACTS, state(0), ignore, clock) as recording:
            recording.save()
            for round, (seconds, _) in enumerate(lengths, start=1):
                clock.now += seconds
                round_s.append(seconds)
                recording.take(result(round))
            assert written[0][0] == 0
            ended = clock.now
        at_work = written[: len(written) - (written[-1][0] >= ended)]
    for (began, until), (then, _) in itertools.pairwise(at_work):
        pause = max(1, 20 * (until - began))
        assert pause * (1 - 1e-9) <= then - until <= pause + max(round_s) + 1e-9
    spent = sum(until - began for began, until in at_work[:-1])
    assert spent <= ended / 20 + 1e-9
    (began, until) = at_work[-1]
    assert ended - until <= max(1, 20 * (until - began)) + 1e-9  # what a kill would have cost now


def test_a_run_that_goes_on_waits_before_its_first_checkpoint(folder, monkeypatch):
    recorded(folder, 0, 1)
    clock, saved = Clock(), []
    clock.now = 5000.0
    with Recording(folder, FACTS, state(1), ignore, clock) as recording:
        monkeypatch.setattr(runs, "save_checkpoint", lambda folder, state: saved.append(state.round))
        for round in (2, 3, 4):
            clock.now += 0.6
            recording.take(result(round))
        assert saved == [3]


# ---------------------------------------------------------------- memory


def test_memory_does_not_grow_with_rounds_times_clients(folder):
    """300 rounds of 1,000 clients; their ids, each an object of its own, would be 10 MB. So after a resume."""
    with Recording(folder, FACTS, state(0), ignore, Clock()) as recording:
        tracemalloc.start()
        for round in range(1, 301):
            recording.take(result(round, cohort=tuple(range(10_000 * round, 10_000 * round + 1000))))
        grown = tracemalloc.get_traced_memory()[0]
        recording.state = state(300)
    kept = Recording(folder, FACTS, state(300), ignore)
    again = tracemalloc.get_traced_memory()[0] - grown
    tracemalloc.stop()
    assert grown < 500_000 and again < 500_000
    assert len(kept.rounds) == 300 and len(runs.open_run(folder).rounds()[299].cohort) == 1000


def test_states_of_past_rounds_are_not_kept(folder):
    with Recording(folder, FACTS, state(0), ignore, Clock()) as recording:
        recording.save()
        first, second = result(1), result(2)
        gone = weakref.ref(first.state)
        recording.take(first)
        recording.save()
        recording.take(second)
        del first
        assert gone() is None


# ---------------------------------------------------------------- baselines, and the split


def test_rounds_that_are_all_there_are_written_without_a_model(folder):
    lines = [(result(round, 0.1).record, result(round, 0.1).evaluations) for round in (1, 2)]
    record_rounds(folder, FACTS, iter(lines), None)
    assert summary(folder)["status"] == "finished" and summary(folder)["initial"] is None
    assert [record for record, _ in lines] == runs.open_run(folder).rounds()
    assert not (folder / "checkpoint").exists()


def federated(sizes):
    n = sum(sizes)
    labels = torch.arange(n) % 3
    data = Examples(torch.zeros(n, 1), labels)
    owners = Partition(np.array([0, *np.cumsum(sizes)]), np.arange(n)[::-1].copy())
    nobody = replace(owners, offsets=np.zeros_like(owners.offsets), indices=np.zeros(0, dtype=np.int64))
    return FederatedData(data, data, owners, nobody, data, 3, ("a", "b", "c"))


def test_split_facts_count_labels_by_client():
    facts = split_facts(federated((4, 1, 2)))
    assert (facts["num_clients"], facts["num_examples"], facts["num_classes"]) == (3, 7, 3)
    assert facts["sizes"] == [4, 1, 2] and facts["test_sizes"] == [0, 0, 0]
    labels = [i % 3 for i in range(7)][::-1]
    own = [labels[:4], labels[4:5], labels[5:]]
    assert facts["counts"] == [[part.count(label) for label in range(3)] for part in own]
    assert facts["class_names"] == ["a", "b", "c"]
    json.dumps(facts)


def test_split_facts_of_very_many_clients_are_a_summary():
    facts = split_facts(federated((1,) * (SPLIT_DETAIL_CLIENTS + 1)), SPLIT_DETAIL_CLIENTS)
    assert facts["sizes"] is None and facts["counts"] is None and facts["summary"]
