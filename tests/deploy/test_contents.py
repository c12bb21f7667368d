import contextlib

import pytest
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedsim.deploy import contents as c
from fedsim.records import ClientEvaluation

WHOLE = st.integers(0, 2**40)


@given(st.text(), st.text(), st.booleans())
def test_facts_come_back(run, settings, evaluate):
    facts = c.RunFacts(run, settings, evaluate)
    assert c.read_facts(c.with_facts(RecordDict(), facts)) == facts


@given(WHOLE, WHOLE.map(lambda n: n + 1), st.booleans(), st.text(), st.lists(st.text()))
def test_members_come_back(client, examples, own, versions, differs):
    member = c.Member(client, examples, own, versions, tuple(differs))
    assert c.read_member(c.member_content(member)) == member


@given(WHOLE.map(lambda n: n + 1), st.floats(0, 1e9), st.floats(0, 1))
def test_scores_come_back(examples, loss, accuracy):
    scores = ClientEvaluation(3, 7, examples, loss, accuracy)
    assert c.read_scores(c.with_scores(RecordDict(), scores), 7, 3) == scores


def test_no_scores():
    assert c.read_scores(c.with_scores(RecordDict(), None), 7, 3) is None


VALUE = st.one_of(
    st.integers(-5, 5), st.floats(), st.text(max_size=3), st.booleans(), st.lists(st.integers(), max_size=2)
)
NAMES = st.sampled_from(["run", "settings", "evaluate", "client", "num_examples", "own_data", "versions", "differs"])


@given(st.dictionaries(NAMES, VALUE))
def test_rubbish_from_outside_is_a_value_error(record):
    content = RecordDict({name: ConfigRecord(dict(record)) for name in ("fedsim.run", "fedsim.member")})
    for read in (c.read_facts, c.read_member):
        with contextlib.suppress(ValueError):
            read(content)


NUMBER = st.one_of(st.integers(-2, 2), st.floats())


@given(st.dictionaries(st.sampled_from(["num_examples", "loss", "accuracy", "more"]), NUMBER))
def test_scores_are_checked(record):
    try:
        found = c.read_scores(RecordDict({"fedsim.scores": MetricRecord(dict(record))}), 1, 2)
    except ValueError:
        return
    assert found is not None and found.num_examples >= 1 and 0 <= found.accuracy <= 1 and found.loss == found.loss


@pytest.mark.parametrize("record", [ArrayRecord(), MetricRecord({"run": 1})])
def test_a_record_of_another_kind(record):
    with pytest.raises(ValueError, match=r"no config record fedsim\.run"):
        c.read_facts(RecordDict({"fedsim.run": record}))
    with pytest.raises(ValueError, match="must be a metric record"):
        c.read_scores(RecordDict({"fedsim.scores": ArrayRecord()}), 1, 2)
