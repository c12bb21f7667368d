"""The round loop: cohorts, what a round leaves behind, going on from a state, and clients whose training diverges."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from federations import control
from scipy import stats
from torch import nn

from fedsim import params as p
from fedsim import rng
from fedsim.data.federated import FederatedData
from fedsim.engines.reference import reference
from fedsim.errors import ClientError, RunError
from fedsim.federation import Federation, cohort, run, start, with_spread
from fedsim.models.layers.dropouts import Dropout
from fedsim.models.layers.keyed import key_names
from fedsim.records import Examples, Partition, RoundRecord
from fedsim.strategies.strategy import fedavg
from fedsim.training.client import LocalWork
from fedsim.training.evaluate import Scores, by_owner, score
from fedsim.training.optimizers import sgd

FALSE_ALARM = 1e-6
SIZES = (9, 4, 13, 2, 6)


def federation(strategy=None, *, inputs=None, lr=0.1, **changes):
    strategy = strategy or fedavg()
    with rng.torch_seeded(1):
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), Dropout(0.3), nn.Linear(6, 3))
    n = sum(SIZES)
    examples = Examples(rng.normal(2, n, 4) if inputs is None else inputs, (rng.uniform(3, n) * 3).long())
    test = Examples(rng.normal(4, 20, 4), (rng.uniform(5, 20) * 3).long())
    owners = Partition(np.array([0, *np.cumsum(SIZES)]), np.arange(n))
    tested = Partition(np.array([0, 3, 3, 10, 11, 20]), rng.permutation(6, 20).numpy())
    data = FederatedData(examples, test, owners, tested, test, 3, ())
    work = LocalWork(model, key_names(model), sgd(lr=lr, momentum=0.9), strategy.local, 2, 4)
    made = Federation(7, data, work, strategy, 4, 3, "fixed", 1, "fail")
    return replace(made, **changes)


def rounds_of(the_federation, state=None):
    results = []
    run(the_federation, state or start(the_federation), reference(), results.append)
    return results


def without_seconds(results):
    return [(replace(result.record, seconds=0.0), result.evaluations) for result in results]


def same_state(a, b):
    assert a.round == b.round and a.clients.keys() == b.clients.keys()
    assert p.same_bits(a.params, b.params) and p.same_bits(a.buffers, b.buffers) and p.same_bits(a.server, b.server)
    assert all(p.same_bits(a.clients[k], b.clients[k]) for k in a.clients)


# ---------------------------------------------------------------- cohorts


def sampled(clients, expected, sampling, rounds, seed=1):
    nobody = Partition(np.zeros(clients + 1, dtype=np.int64), np.zeros(0, dtype=np.int64))
    made = federation()
    made = replace(
        made,
        seed=seed,
        data=replace(made.data, partition=nobody),
        clients_per_round=expected,
        sampling=sampling,
    )
    return [cohort(made, round) for round in range(1, rounds + 1)]


@pytest.mark.parametrize("sampling", ["fixed", "poisson"])
def test_a_cohort_is_ascending_without_repeats_and_a_function_of_seed_and_round(sampling):
    cohorts = sampled(40, 11, sampling, 50)
    for one, again in zip(cohorts, sampled(40, 11, sampling, 50), strict=True):
        assert one.tolist() == again.tolist() == sorted(set(one.tolist())) and set(one.tolist()) <= set(range(40))
        assert sampling == "poisson" or len(one) == 11
    assert len({tuple(one.tolist()) for one in cohorts}) == 50
    assert cohorts[0].tolist() != sampled(40, 11, sampling, 1, seed=2)[0].tolist()


@pytest.mark.parametrize("sampling", ["fixed", "poisson"])
def test_every_client_is_chosen_equally_often(sampling):
    """Exact binomial test for each of 12 clients, n = 5,000 rounds; 1e-6 over all clients together."""
    counts = np.bincount(np.concatenate(sampled(12, 5, sampling, 5000)), minlength=12)
    assert min(stats.binomtest(int(count), 5000, 5 / 12).pvalue for count in counts) > FALSE_ALARM / 12


def test_sizes_of_poisson_cohorts_are_binomial():
    """Chi-squared over sizes 0 to 12, tails pooled below an expectation of 5, n = 5,000 rounds."""
    sizes = [len(one) for one in sampled(12, 3, "poisson", 5000)]
    expected = 5000 * stats.binom.pmf(np.arange(13), 12, 0.25)
    pooled = np.minimum(np.arange(13), int(np.flatnonzero(expected >= 5).max()))
    counts = np.bincount(pooled[sizes], minlength=pooled.max() + 1)
    assert stats.chisquare(counts, np.bincount(pooled, weights=expected)).pvalue > FALSE_ALARM


def test_a_poisson_cohort_of_few_out_of_very_many_is_drawn_with_all_53_bits():
    """SplitMix64 in numpy, 30 rounds of a million clients; with draws of 24 bits 3 in 4 such comparisons would fail."""
    clients, expected = 1_000_000, 3
    counters = np.arange(1, clients + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for round, one in enumerate(sampled(clients, expected, "poisson", 30), start=1):
        z = np.uint64(rng.fold(1, "round", round, "cohort")) + counters
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
        chosen = (z >> np.uint64(11)).astype(np.float64) < expected / clients * 2.0**53
        assert one.tolist() == np.flatnonzero(chosen).tolist()


def test_all_clients_are_chosen_when_all_are_expected():
    for sampling in ("fixed", "poisson"):
        assert all(one.tolist() == list(range(12)) for one in sampled(12, 12, sampling, 20))


def test_an_empty_cohort_leaves_the_model_as_it_is():
    made = federation(control(), sampling="poisson", clients_per_round=1, rounds=30)
    results = rounds_of(made)
    empty = [i for i in range(1, 31) if results[i].record.clients == 0]
    assert 3 < len(empty) < 25  # (1 - 1/5)^5 = a third of the rounds
    for i in empty:
        before, after = results[i - 1].state, results[i].state
        same_state(replace(before, round=i), after)
        record = results[i].record
        assert (record.train_loss, record.bytes_up, record.bytes_down) == (None, 0, 0)
        assert record.accuracy == results[i - 1].record.accuracy


# ---------------------------------------------------------------- rounds


def test_a_run_reports_the_initial_model_and_then_every_round():
    made = federation()
    results = rounds_of(made)
    assert [result.record.round for result in results] == [result.state.round for result in results] == [0, 1, 2, 3, 4]
    first = results[0]
    assert p.same_bits(first.state.params, p.of(made.work.model)[0])
    assert (first.record.clients, first.record.bytes_up, first.record.train_loss) == (0, 0, None)
    assert first.record.loss == pytest.approx(
        score(made.work.model, *p.of(made.work.model), made.data.test).mean()[0], abs=1e-12
    )
    assert all(result.record.clients == 3 and result.record.bytes_up > 0 for result in results[1:])
    assert results[-1].record.train_loss < results[1].record.train_loss


def test_the_last_round_and_every_so_many_are_evaluated():
    results = rounds_of(federation(eval_every=3, rounds=5))
    assert [result.record.accuracy is not None for result in results] == [True, False, False, True, False, True]
    assert [bool(result.evaluations) for result in results] == [True, False, False, True, False, True]


@pytest.mark.parametrize("done", [0, 1, 2, 3, 4])
def test_going_on_from_a_state_equals_a_run_that_was_never_stopped(done):
    """Momentum, dropout, states at clients and server: all of it, bit for bit."""
    made = federation(control())
    whole = rounds_of(made)
    assert len(whole[-1].state.clients) > 3 and p.l2_norm(whole[-1].state.server) > 0
    rest = rounds_of(made, whole[done].state)
    expected = whole if done == 0 else whole[done + 1 :]
    assert without_seconds(rest) == without_seconds(expected)
    if rest:
        same_state(rest[-1].state, whole[-1].state)


def test_states_of_clients_matter_to_the_tests_above():
    made = federation(control())
    whole = rounds_of(made)
    forgetful = rounds_of(made, replace(whole[2].state, clients={}))
    assert not p.same_bits(forgetful[-1].state.params, whole[-1].state.params)


def test_neither_the_past_nor_torchs_global_generator_matters_nor_changes():
    first = rounds_of(federation())
    with torch.random.fork_rng(devices=[]):
        torch.rand(5)
        before = torch.get_rng_state()
        again = rounds_of(federation())
        assert torch.equal(torch.get_rng_state(), before)
    assert without_seconds(first) == without_seconds(again)
    same_state(first[-1].state, again[-1].state)
    assert without_seconds(rounds_of(federation(seed=8))) != without_seconds(first)


def test_the_model_template_is_not_trained():
    made = federation()
    before = p.of(made.work.model)[0]
    rounds_of(made)
    assert p.same_bits(before, p.of(made.work.model)[0])


# ---------------------------------------------------------------- divergence


def one_bad_client():
    """Inputs of client 2 are so large that its second step is not finite."""
    inputs = rng.normal(2, sum(SIZES), 4)
    inputs[13:26] *= 1e30
    return inputs


def test_a_client_that_diverges_fails_the_run():
    told = []
    made = federation(inputs=one_bad_client(), clients_per_round=5)
    with pytest.raises(ClientError, match="round 1, client 2: training diverged"):
        run(made, start(made), reference(), told.append)
    assert [result.record.round for result in told] == [0]


def test_a_client_that_diverges_can_be_skipped():
    results = rounds_of(federation(inputs=one_bad_client(), clients_per_round=5, on_nan="skip"))
    assert all(result.record.skipped == (2,) and result.record.clients == 4 for result in results[1:])
    assert all(p.all_finite(result.state.params) for result in results)
    assert not p.same_bits(results[0].state.params, results[-1].state.params)


def test_if_all_diverge_the_model_stays_as_it_is():
    results = rounds_of(federation(lr=1e30, on_nan="skip", clients_per_round=5))
    assert all(result.record.skipped == (0, 1, 2, 3, 4) for result in results[1:])
    assert p.same_bits(results[0].state.params, results[-1].state.params)


def test_a_server_step_that_overflows_fails_the_run():
    with pytest.raises(RunError, match="round 1: the global model is no longer finite"):
        rounds_of(federation(replace(fedavg(), server=fedavg(server_lr=3e38).server), lr=10.0))


# ---------------------------------------------------------------- evaluation


def test_each_client_is_scored_on_its_own_examples():
    """A slow loop over clients; one has no examples, one only examples whose labels do not count."""
    loss, correct = rng.normal(1, 9, dtype=torch.float64), torch.tensor([1.0, 0, 2, 0, 1, 1, 0, 0, 3])
    labels = torch.tensor([2.0, 1, 3, 0, 1, 2, 1, 1, 3])
    owners = Partition(np.array([0, 3, 3, 4, 8]), np.array([8, 2, 5, 3, 0, 1, 7, 6]))
    rows = by_owner(Scores(loss, correct, labels), owners).lines(6)
    expected = []
    for k in range(4):
        own = owners.client(k).tolist()
        count = sum(float(labels[i]) for i in own)
        if count:
            expected.append(
                (k, len(own), sum(float(loss[i]) for i in own) / count, sum(float(correct[i]) for i in own))
            )
    assert [row.client for row in rows] == [0, 3] and all(row.round == 6 for row in rows)
    for row, (client, size, mean, right) in zip(rows, expected, strict=True):
        assert (row.client, row.num_examples) == (client, size)
        assert row.loss == pytest.approx(mean, abs=1e-14)
        assert row.accuracy == pytest.approx(right / sum(float(labels[i]) for i in owners.client(client)), abs=1e-14)


def test_the_rows_of_a_run_are_those_of_the_model_on_each_clients_examples():
    made = federation(rounds=2)
    last = rounds_of(made)[-1]
    sizes = made.data.test_partition.sizes()
    assert [row.client for row in last.evaluations] == [0, 2, 3, 4]
    for row in last.evaluations:
        own = made.data.test.take(torch.from_numpy(made.data.test_partition.client(row.client)))
        loss, accuracy = score(made.work.model, last.state.params, last.state.buffers, own).mean()
        assert (row.loss, row.accuracy, row.num_examples) == (pytest.approx(loss), accuracy, sizes[row.client])
    assert last.record.accuracy == pytest.approx(sum(row.accuracy * row.num_examples for row in last.evaluations) / 20)


def test_clients_are_tested_on_their_noisy_copy_and_the_model_on_the_clean_one():
    made = federation(rounds=1)
    noisy = replace(made.data, client_test=Examples(made.data.test.inputs * -3, made.data.test.labels))
    clean, other = rounds_of(made)[-1], rounds_of(replace(made, data=noisy))[-1]
    assert (clean.record.loss, clean.record.accuracy) == (other.record.loss, other.record.accuracy)
    assert clean.evaluations != other.evaluations
    worst = replace(noisy, test=noisy.client_test)
    assert other.evaluations == rounds_of(replace(made, data=worst))[-1].evaluations


@pytest.mark.parametrize("clients", [*range(1, 12), 19, 20, 21, 30, 41, 60, 70])
def test_the_worst_tenth_is_rounded_up(clients):
    accuracies = (rng.uniform(clients, clients, dtype=torch.float64) * 8).round().div(8).tolist()  # with ties
    record = with_spread(RoundRecord(1, 0.0, 0.0, None, 0, 0.0, 0, 0), accuracies)
    left, worst = list(accuracies), []
    while 10 * len(worst) < clients:
        worst.append(left.pop(left.index(min(left))))
    assert record.client_accuracy_worst_tenth == pytest.approx(sum(worst) / len(worst), abs=1e-12)
    mean = math.fsum(accuracies) / clients
    variance = math.fsum((a - mean) ** 2 for a in accuracies) / clients
    assert record.client_accuracy_mean == pytest.approx(mean, abs=1e-12)
    assert record.client_accuracy_std == pytest.approx(math.sqrt(variance), abs=1e-9)


def test_without_clients_there_is_no_spread():
    blank = RoundRecord(1, 0.0, 0.0, None, 0, 0.0, 0, 0)
    assert with_spread(blank, np.array([])) == blank
