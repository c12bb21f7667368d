"""What messages between server and clients hold beside broadcast and update: who is there, and how a model does.

Contents come from another machine: every reader checks them and raises ``ValueError``.
"""

import math
from dataclasses import asdict, dataclass

from flwr.app import ConfigRecord, MetricRecord, RecordDict

from fedsim.records import ClientEvaluation

TRAIN, EVALUATE, JOIN, END = "train", "evaluate", "query.join", "query.end"  # types of messages
_RUN, _MEMBER, _SCORES = "fedsim.run", "fedsim.member", "fedsim.scores"  # names of records


@dataclass(frozen=True)
class RunFacts:
    """What every message of the server says.

    run: a word that no other run has. settings: what clients must agree on, as text. evaluate: whether the client is
        to say how the model it is sent does on its held-out examples. since: round in which training last began anew:
        what a client kept before counts no more.
    """

    run: str
    settings: str
    evaluate: bool = False
    since: int = 0


@dataclass(frozen=True)
class Member:
    """What a client says of itself when it joins.

    num_examples: it trains on; the number it must send with every update. own_data: not a part of the server's split.
    differs: settings that are not those of the server, in words; with any, the client cannot take part.
    """

    client: int
    num_examples: int
    own_data: bool
    versions: str
    differs: tuple[str, ...]


def with_facts(content: RecordDict, facts: RunFacts) -> RecordDict:
    """The content with the facts in it. Not a copy."""
    content[_RUN] = ConfigRecord(asdict(facts))
    return content


def read_facts(content: RecordDict) -> RunFacts:
    """The facts in a server's message."""
    record = _record(content, _RUN)
    run, settings, evaluate = record.get("run"), record.get("settings"), record.get("evaluate")
    if not isinstance(run, str) or not isinstance(settings, str) or not isinstance(evaluate, bool):
        raise ValueError(f"{_RUN} must hold run and settings as text and evaluate as true or false")
    since = record.get("since")
    if type(since) is not int or since < 0:
        raise ValueError(f"{_RUN} must hold since as a round, got {since!r:.100}")
    return RunFacts(run, settings, evaluate, since)


def member_content(member: Member) -> RecordDict:
    """Content of the reply to ``JOIN``."""
    record = ConfigRecord(
        {
            "client": member.client,
            "num_examples": member.num_examples,
            "own_data": member.own_data,
            "versions": member.versions,
            "differs": list(member.differs),
        }
    )
    return RecordDict({_MEMBER: record})


def read_member(content: RecordDict) -> Member:
    """The inverse of :func:`member_content`."""
    record = _record(content, _MEMBER)
    client, examples, own = (record.get(key) for key in ("client", "num_examples", "own_data"))
    if type(client) is not int or type(examples) is not int or not isinstance(own, bool):
        raise ValueError(f"{_MEMBER} must hold client and num_examples as whole numbers and own_data as true or false")
    if client < 0 or examples < 1:
        raise ValueError(f"client must be >= 0 and num_examples >= 1, got {client} and {examples}")
    versions, differs = record.get("versions"), record.get("differs")
    if not isinstance(versions, str) or not isinstance(differs, list) or not all(isinstance(d, str) for d in differs):
        raise ValueError(f"{_MEMBER} must hold versions as text and differs as a list of texts")
    return Member(client, examples, own, versions, tuple(str(line) for line in differs))


def with_scores(content: RecordDict, scores: ClientEvaluation | None) -> RecordDict:
    """The content with a client's evaluation in it, if there is one. Not a copy."""
    if scores is not None:
        content[_SCORES] = MetricRecord(
            {"num_examples": scores.num_examples, "loss": scores.loss, "accuracy": scores.accuracy}
        )
    return content


def read_scores(content: RecordDict, client: int, round: int) -> ClientEvaluation | None:
    """What a client says of the model after ``round``; None if it has nothing to test on."""
    record = content.get(_SCORES)
    if record is None:
        return None
    if not isinstance(record, MetricRecord):
        raise ValueError(f"{_SCORES} must be a metric record")
    examples, loss, accuracy = (record.get(key) for key in ("num_examples", "loss", "accuracy"))
    if type(examples) is not int or not isinstance(loss, float) or not isinstance(accuracy, float):
        raise ValueError(f"{_SCORES} must hold num_examples, loss and accuracy")
    if examples < 1 or math.isnan(loss) or not 0 <= accuracy <= 1:
        raise ValueError(f"{_SCORES}: num_examples {examples}, loss {loss}, accuracy {accuracy}")
    return ClientEvaluation(round, client, examples, loss, accuracy)


def _record(content: RecordDict, name: str) -> ConfigRecord:
    record = content.get(name)
    if not isinstance(record, ConfigRecord):
        raise ValueError(f"the message has no config record {name}")
    return record
