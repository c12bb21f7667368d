"""The model of a run that pruned and was stopped: what is left of it, as the last checkpoint has it."""

import pytest
import torch

import fedsim
from fedsim import runs

CONFIG = {
    "data": {"dataset": "digits", "clients": 4},
    "model": {"name": "mlp", "hidden": [8]},
    "train": {"rounds": 4, "clients_per_round": 2, "batch_size": 32},
    "engine": "reference",
}


def stopped(pruning, tmp_path, after):
    """A run of four rounds that somebody stopped after this one."""
    started = []

    def stop(record):
        if record.round == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedsim.run(
            {**CONFIG, "pruning": pruning, "output": str(tmp_path)},
            on_start=lambda run, federation: started.append(run),
            on_round=stop,
        )
    return started[0]


@pytest.mark.parametrize(("after", "units"), [(1, 8), (3, 4)])
def test_of_removed_channels_it_has_no_more_than_there_are(after, units, tmp_path):
    run = stopped({"name": "l1-filter", "at": 2, "sparsity": 0.5}, tmp_path, after)
    model, tensors = run.model(), runs.open_run(run.folder).model()
    assert run.rounds[-1].round == after and run.summary["status"] != "finished"
    assert [tuple(t.shape) for t in model.state_dict().values()] == [(units, 64), (units,), (10, units), (10,)]
    assert all(torch.equal(t, tensors[name]) for name, t in model.state_dict().items())
    assert model(torch.zeros(3, 1, 8, 8)).shape == (3, 10)


def test_of_masked_weights_it_has_zeros(tmp_path):
    run = stopped({"name": "lottery-ticket", "every": 1, "rate": 0.5}, tmp_path, 3)
    model, tensors = run.model(), runs.open_run(run.folder).model()
    zeros = {name: int((t == 0).sum()) for name, t in model.state_dict().items() if t.dim() > 1}
    last = run.rounds[-1]
    assert last.round == 3 and last.sparsity == pytest.approx(sum(zeros.values()) / (8 * 64 + 8 * 10))
    assert {n: 1 - last.remaining[n] for n in zeros} == pytest.approx(
        {n: count / tensors[n].numel() for n, count in zeros.items()}
    )
    assert all(torch.equal(t, tensors[name]) for name, t in model.state_dict().items())
