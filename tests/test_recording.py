"""How a run ends shows in its folder, whatever ended it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedsim import params as p
from fedsim import runs
from fedsim.data.federated import FederatedData
from fedsim.errors import ClientError, RunError
from fedsim.federation import RoundResult
from fedsim.recording import SPLIT_DETAIL_CLIENTS, Facts, Recording, record_rounds, split_facts
from fedsim.records import ClientEvaluation, Examples, Partition, RoundRecord, ServerState

FACTS = Facts("test", "federated", "mlp", 12, 5, (1, 8, 8), 10, 4, 0.5)


def result(round, accuracy):
    params = {"w": torch.full((2,), float(round))}
    record = RoundRecord(round, 1 - accuracy, accuracy, None, 2, 0.1, 5, 6)
    return RoundResult(ServerState(round, params, {}), record, (ClientEvaluation(round, 0, 3, 0.5, 0.5),))


@pytest.fixture
def folder(tmp_path):
    made = runs.create(tmp_path, "test")
    runs.write_config(made, {"name": "test"})
    runs.write_json(made / "environment.json", {"host": "here"})
    return made


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def recorded(folder, *rounds, on_round=lambda record: None, error=None):
    with Recording(folder, FACTS, on_round) as recording:
        for round in rounds:
            recording.take(result(round, round / 10))
        if error is not None:
            raise error


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


@pytest.mark.parametrize("broken", ["append_round", "save_checkpoint", "save_model"])
def test_a_full_disk_is_a_run_error_that_names_the_folder(folder, monkeypatch, broken):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs, broken, full)
    with pytest.raises(RunError, match=rf"{folder.name}: cannot be written: No space left on device"):
        recorded(folder, 0, 1)


def test_a_disk_that_stays_full_still_lets_the_first_error_through(folder, monkeypatch):
    error = ClientError(1, 2, "diverged")

    def full(*_):
        raise OSError(28, "No space left on device")

    with pytest.raises(ClientError), Recording(folder, FACTS, lambda record: None):
        monkeypatch.setattr(runs, "write_bytes", full)
        raise error


def test_the_state_is_saved_before_anybody_is_told(folder):
    def told(record):
        assert runs.load_checkpoint(folder).round == record.round
        raise BrokenPipeError("nobody listens")

    with pytest.raises(BrokenPipeError):
        recorded(folder, 0, 1, on_round=told)
    assert summary(folder)["status"] == "failed" and summary(folder)["rounds_done"] == 1


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
