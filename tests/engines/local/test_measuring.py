import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from fedsim import params as p
from fedsim.engines.local import measuring
from fedsim.engines.local.measuring import candidates, choose, described, fastest, measure, mixes_examples, not_mappable
from fedsim.engines.local.plan import Plan
from fedsim.models.layers.dropouts import Dropout
from fedsim.models.recurrent import char_lstm
from fedsim.training.optimizers import adam

ONE, FUSED, FUSED_4, FUSED_16, MAPPED_4, MAPPED_16 = (
    Plan(path, chunk)
    for path, chunk in (
        ("sequential", 1),
        ("fused", 1),
        ("fused", 4),
        ("fused", 16),
        ("vectorised", 4),
        ("vectorised", 16),
    )
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fedsim" / "plans"


@pytest.fixture
def measured(monkeypatch):
    """Every measurement finds FUSED_4 the fastest; what was measured."""
    calls = []

    def pretend(job, plans):
        calls.append(list(plans))
        return {plan: 1000.0 + 500 * (plan == FUSED_4) for plan in plans}

    monkeypatch.setattr(measuring, "measure", pretend)
    return calls


def lstm():
    return char_lstm((6,), 5, embedding=2, hidden=4, layers=1)


def normed(kind):
    return lambda: nn.Sequential(nn.Linear(5, 6), kind(6), nn.ReLU(), nn.Linear(6, 3))


class Drawing(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(5, 3)

    def forward(self, x):
        return self.fc(functional.dropout(x, 0.4, self.training))


# ---------------------------------------------------------------- which is the fastest


@pytest.mark.parametrize(
    ("speeds", "expected"),
    [
        ({ONE: 100.0}, ONE),
        ({ONE: 100.0, FUSED: 109.0}, ONE),
        ({ONE: 100.0, FUSED: 111.0}, FUSED),
        ({ONE: 100.0, FUSED: 109.0, FUSED_4: 119.0}, FUSED_4),  # much better than what is best so far
        ({ONE: 100.0, FUSED: 130.0, FUSED_4: 140.0, MAPPED_4: 142.0}, FUSED),
        ({ONE: 100.0, FUSED: 90.0, FUSED_4: 500.0, MAPPED_4: 300.0}, FUSED_4),
    ],
)
def test_a_plan_must_be_much_faster_than_a_plainer_one(speeds, expected):
    assert fastest(speeds) == expected


def test_larger_chunks_of_a_hopeless_path_are_not_tried(job_of, monkeypatch):
    known = {ONE: 100.0, FUSED: 300.0, FUSED_4: 90.0, FUSED_16: 80.0, MAPPED_4: 149.0, MAPPED_16: 999.0}
    tried = []
    monkeypatch.setattr(measuring, "_speed", lambda job, plan: tried.append(plan) or known[plan])
    assert measure(job_of(), list(known)) == {plan: speed for plan, speed in known.items() if plan != MAPPED_16}
    assert tried == [ONE, FUSED, FUSED_4, FUSED_16, MAPPED_4]


@pytest.mark.parametrize("plan", [ONE, FUSED_4, MAPPED_16])
@pytest.mark.parametrize("batch", [4, None])
def test_a_measurement_counts_the_examples_of_four_steps_and_changes_nothing(job_of, monkeypatch, plan, batch):
    job = job_of(sizes=(20, 3, 9, 17, 1, 30), batch=batch)
    before, state = {n: t.clone() for n, t in job.work.model.state_dict().items()}, torch.get_rng_state()
    monkeypatch.setattr(measuring, "SPENT_S", 0.0)
    (speed,) = measure(job, [plan]).values()
    assert speed > 0
    first = [20, 3, 9, 17, 1, 30][: plan.chunk]
    counted = [min(size, 16 if batch else sum(first)) for size in (sorted(first)[::-1] * plan.chunk)[: plan.chunk]]
    assert measuring._train(job, plan, steps=4) == sum(counted)
    assert p.same_bits(before, job.work.model.state_dict()) and torch.equal(state, torch.get_rng_state())


# ---------------------------------------------------------------- which plans there are


@pytest.mark.parametrize(
    ("mode", "cohort", "expected"),
    [
        ("auto", 14, [("sequential", 1), ("fused", 1), ("fused", 4), ("vectorised", 4)]),
        ("auto", 3, [("sequential", 1), ("fused", 1), ("vectorised", 1)]),
        ("sequential", 30, [("sequential", 1)]),
        ("vectorised", 30, [("vectorised", 4), ("vectorised", 8)]),
        ("vectorised", 1, [("vectorised", 1)]),
        ("fused", 30, [("fused", 1), ("fused", 4), ("fused", 8)]),
        ("fused", 1, [("fused", 1)]),
    ],
)  # fmt: skip
def test_candidates_of_a_chain_the_plainest_first(job_of, mode, cohort, expected):
    job = job_of(sizes=(4,) * 30, cohort=cohort)
    assert [(plan.path, plan.chunk) for plan in candidates(job, mode)] == expected


def test_a_model_that_is_no_chain_is_not_fused_and_one_that_cannot_be_mapped_not_vectorised(job_of):
    no_chain, recurrent = job_of(normed(nn.BatchNorm1d), sizes=(8,) * 8), job_of(lstm, tokens=5, sizes=(4,) * 8)
    assert [plan.path for plan in candidates(no_chain, "auto")] == ["sequential", "vectorised"]
    assert [plan.path for plan in candidates(recurrent, "auto")] == ["sequential"]
    with pytest.raises(ValueError, match=r"^fused needs a chain of standard layers"):
        candidates(no_chain, "fused")
    with pytest.raises(ValueError, match=r"^the model cannot be vectorised over clients: \S"):
        candidates(recurrent, "vectorised")


@pytest.mark.filterwarnings("default")  # as outside of tests
def test_why_a_model_cannot_be_mapped(job_of):
    assert not_mappable(job_of()) is None
    why = not_mappable(job_of(lstm, tokens=5))
    assert "batching rule" in why and "rnn" in why and "\n" not in why
    assert not_mappable(job_of(Drawing, seeded=True)) == "it draws from torch's global generator"
    assert "randomness" in not_mappable(job_of(Drawing))  # of a model that was not told to draw


# ---------------------------------------------------------------- which models mix the examples of a batch


@pytest.mark.parametrize(
    ("model", "mixes"),
    [
        (lambda: nn.Linear(5, 3), False),
        (lambda: nn.Sequential(nn.Linear(5, 6), Dropout(0.5), nn.Linear(6, 3)), False),
        (normed(nn.LayerNorm), False),
        (normed(lambda width: nn.GroupNorm(2, width)), False),
        (normed(nn.BatchNorm1d), True),
        (normed(lambda width: nn.BatchNorm1d(width, track_running_stats=False)), True),
        (Drawing, False),
    ],
)
def test_batch_norm_mixes_examples_and_nothing_else_does(job_of, model, mixes):
    job = job_of(model)
    before = {name: tensor.clone() for name, tensor in job.work.model.state_dict().items()}
    assert mixes_examples(job.work, job.data.train) is mixes
    assert p.same_bits(before, job.work.model.state_dict())


def test_models_of_tokens_do_not_mix_unless_batch_norm_is_in_them(job_of):
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.norm, self.head = nn.Embedding(5, 4), nn.BatchNorm1d(6), nn.Linear(4, 5)

        def forward(self, tokens):
            return self.head(self.norm(self.embedding(tokens)))

    plain, mixing = job_of(lstm, tokens=5), job_of(Mixing, tokens=5)
    assert mixes_examples(plain.work, plain.data.train) is False
    assert mixes_examples(mixing.work, mixing.data.train) is True


# ---------------------------------------------------------------- the choice, and what is remembered of it


def test_a_plan_is_measured_once_and_then_remembered(job_of, cache, measured):
    first = choose(job_of(sizes=(4,) * 16), "auto", {})
    assert first.plan == FUSED_4 and first.why == "measured" and first.speeds["fused, 4 clients"] == 1500.0
    assert len(list(cache.iterdir())) == 1  # and nothing half written beside it
    assert choose(job_of(sizes=(4,) * 16), "auto", {}) == first
    assert len(measured) == 1 and measured[0][0] == ONE


@pytest.mark.parametrize(
    "change",
    [
        {"batch": 8},
        {"batch": None},
        {"model": lambda: nn.Linear(5, 3)},
        {"optimizer": adam(lr=0.1)},
        {"cohort": 30},
        {"sizes": (4,) * 64},
    ],
)
def test_another_job_is_measured_by_itself(job_of, measured, change):
    choose(job_of(sizes=(4,) * 16), "auto", {})
    choose(job_of(**{"sizes": (4,) * 16, **change}), "auto", {})
    assert len(measured) == 2


def test_another_mode_is_measured_by_itself(job_of, measured):
    for mode in ("auto", "fused", "vectorised", "sequential"):
        choose(job_of(sizes=(4,) * 16), mode, {})
    assert [{plan.path for plan in plans} for plans in measured[1:]] == [{"fused"}, {"vectorised"}, {"sequential"}]


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"null",
        b'{"path": "fused"}',
        b'{"path": "fused", "chunk": 0}',
        b'{"path": "fused", "chunk": 7}',  # no candidate of this job
    ],
)
def test_a_damaged_memory_costs_a_measurement_and_is_mended(job_of, cache, measured, damage):
    job = job_of(sizes=(4,) * 16)
    first = choose(job, "auto", {})
    (file,) = cache.iterdir()
    file.write_bytes(damage)
    assert choose(job, "auto", {}) == first and len(measured) == 2
    assert json.loads(file.read_text())["chunk"] == 4
    assert choose(job, "auto", {}) == first and len(measured) == 2


@pytest.mark.parametrize("speeds", ["fast", None, {"fused, 4 clients": "fast"}, [1]])
def test_a_memory_with_damaged_speeds_is_a_plan_of_unknown_speed(job_of, cache, measured, speeds):
    choose(job_of(sizes=(4,) * 16), "auto", {})
    (file,) = cache.iterdir()
    file.write_text(json.dumps({"path": "fused", "chunk": 1, "speeds": speeds}))
    found = choose(job_of(sizes=(4,) * 16), "auto", {})
    assert found.plan == FUSED and found.speeds == {} and len(measured) == 1


def test_a_home_that_cannot_be_written_costs_a_measurement_each_time(job_of, tmp_path, monkeypatch, measured):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert choose(job_of(), "auto", {}) == choose(job_of(), "auto", {})
    assert len(measured) == 2


def test_the_plan_a_run_began_with_wins_over_what_is_remembered(job_of, measured):
    job = job_of(sizes=(4,) * 16)
    remembered = choose(job, "auto", {})
    recorded = {"path": "vectorised", "chunk": 3, "speeds": {"vectorised, 3 clients": 7.0}, "chosen": "measured"}
    found = choose(job, "auto", recorded)
    assert found.plan == Plan("vectorised", 3) and found.speeds == {"vectorised, 3 clients": 7.0}
    assert found.why == "as when the run began" and found.plan != remembered.plan
    assert choose(job, "vectorised", recorded) == found
    assert choose(job, "auto", described(found)) == found
    assert choose(job, "fused", recorded).plan == FUSED_4  # a mode that rules it out
    assert choose(job, "auto", {"name": "reference"}) == remembered


def test_a_real_choice_is_among_the_candidates_and_tells_speeds(job_of):
    job = job_of(sizes=(9, 4, 13, 7, 20, 2) * 3)
    found = choose(job, "auto", {})
    assert found.plan in candidates(job, "auto")
    assert {"sequential, 1 client", measuring.name(found.plan)} <= found.speeds.keys()
    assert all(speed > 0 for speed in found.speeds.values())
    assert choose(replace(job, rounds=99), "auto", {}) == found  # rounds do not matter
