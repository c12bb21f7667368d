"""The part of a run's page that shows what two parties have sent each other."""

from collections.abc import Mapping
from typing import Any

from fedsim.report.numbers import ABSENT, duration, number, size
from fedsim.report.page import Table
from fedsim.report.sections import Section

NOTE = "A transfer between two parties: loss and accuracy are of labels for rows that only party B has."
_MESSAGES = {
    "hello": "what both must have alike",
    "ids": "ids, masked but in the plain protocol",
    "aligned": "whether both found the same people",
    "key": "public key",
    "secrets": "hidden values and what goes with them",
    "masked": "products under a mask",
    "opened": "masked numbers, decrypted or opened",
    "answer": "shares of products",
    "factor": "triples made without a helper",
    "predict": "how many rows are asked about",
    "labels": "predicted labels",
    "stop": "whether to go on",
}


def transfer(summary: Mapping[str, Any]) -> Section:
    """Who has sent what, and what that cost.

    summary: of a run of kind transfer.
    """
    found = summary.get("transfer") or {}
    sent = {role: found.get(f"sent_by_{role}") for role in ("a", "b")}
    facts = [("protocol", str(found.get("protocol", ABSENT))), ("hidden values", number(found.get("hidden")))]
    facts += [("common people", number(found.get("overlap"))), ("predictions", number(found.get("predictions")))]
    for role, other in (("a", "B"), ("b", "A")):
        if found.get(f"exposed_{role}"):
            facts.append((f"hidden values of party {role.upper()}", f"can be found out by party {other}"))
    for role in ("a", "b"):
        facts += _counted(role, found.get(f"counted_by_{role}") or {})
    if not any(sent.values()):
        return Section("Messages", "What the parties sent is written when a run is finished.", facts=tuple(facts))
    kinds = [kind for kind in _MESSAGES if any(kind in (one or {}) for one in sent.values())]
    rows = tuple((kind, _MESSAGES[kind], *(_bytes(sent[role], kind) for role in ("a", "b"))) for kind in kinds)
    table = Table("Messages by kind", ("kind", "what it holds", "A to B", "B to A"), rows)
    return Section("Messages", "Bytes of whole messages, as they were sent.", facts=tuple(facts), table=table)


def _bytes(sent: Mapping[str, int] | None, kind: str) -> str:
    return ABSENT if not sent or kind not in sent else size(sent[kind])


def _counted(role: str, counted: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a party has counted: ciphertexts, triples, seconds."""
    name, told = f"party {role.upper()}", []
    for what, value in counted.items():
        inner = value if isinstance(value, Mapping) else {"": value}
        for key, one in inner.items():
            words = " ".join(part for part in (name, what.replace("_", " "), key) if part)
            told.append((words.replace(" seconds", ""), duration(one) if "seconds" in what else number(one)))
    return told
