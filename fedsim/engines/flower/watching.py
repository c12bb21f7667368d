"""What a Flower app shows while it runs: its messages, and the strategies that it starts. The app is not changed.

Messages are seen on the grid. ``Strategy.start`` keeps its results to itself and gives them to the app only, so it is
wrapped for the time of a run. An app with a loop of its own, without a strategy, shows its messages only; its rounds
are known if the messages say theirs, as Flower's strategies do.
"""

import functools
import inspect
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import Result, Strategy

from fedsim.engines.flower.messages import content_bytes

Metrics = dict[str, float | list[float]]

EXAMPLES = "num-examples"  # what Flower's strategies weight by


@dataclass
class Phase:
    """Training or evaluation of one round.

    replies: metrics of each client that answered, by partition-id. failed: why the others did not.
    aggregated: what the strategy made of the metrics; None if it did not say.
    """

    replies: dict[int, Metrics] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    aggregated: Metrics | None = None

    def metrics(self) -> Metrics:
        """Aggregated metrics; where the app does not say, means weighted by examples, of what all clients report."""
        if self.aggregated is not None:
            return self.aggregated
        shared = [set(own) for own in self.replies.values() if EXAMPLES in own]
        names = sorted(set.intersection(*shared) - {EXAMPLES}) if shared else []
        return {name: _mean(self.replies, name) for name in names if _scalar(self.replies, name)}


@dataclass
class Round:
    """One round, as far as it can be seen. server: metrics of the server's own evaluation, None if it made none."""

    number: int
    began: float
    ended: float
    train: Phase = field(default_factory=Phase)
    evaluate: Phase = field(default_factory=Phase)
    server: Metrics | None = None
    bytes_up: int = 0
    bytes_down: int = 0


class Watch:
    """Sees what happens and tells of each round when it is over.

    Args:
        first_node: node id of partition 0.
        on_round: called with each round once it is over: when the next one begins, and at the end.

    Attributes:
        strategies: names of strategies that were started. planned: rounds that they were asked for, so far.
        initial: metrics of the server's evaluation before the first round.
        arrays: global arrays, as last aggregated; None if no strategy has shown any.
        messages, answers, unnumbered: messages, replies without error, and messages that belong to no known round.
        first_failure: of a client, in words.
    """

    def __init__(self, first_node: int, on_round: Callable[[Round], None]) -> None:
        self.strategies: list[str] = []
        self.planned = 0
        self.initial: Metrics | None = None
        self.arrays: ArrayRecord | None = None
        self.messages = self.answers = self.unnumbered = 0
        self.first_failure: str | None = None
        self._first_node, self._on_round = first_node, on_round
        self._now: Round | None = None  # the round under way
        self._offset = self._last = 0  # an app may start several strategies; rounds are counted through
        self._starting = False

    def message(self, message: Message, reply: Message) -> None:
        """A message was answered."""
        kind, client = message.metadata.message_type.partition(".")[0], message.metadata.dst_node_id - self._first_node
        number = self._number(message)
        self.messages, self.answers = self.messages + 1, self.answers + (not reply.has_error())
        what = f"{reply.error.reason}" if reply.has_error() else None
        if what is not None and self.first_failure is None:
            during = "" if number is None else f"round {number}, "
            self.first_failure = f"{during}client {client} (node {message.metadata.dst_node_id}), {kind}: {what}"
        if number is None:
            self.unnumbered += 1
            return
        now = self._enter(number)
        now.bytes_down += content_bytes(message.content)
        now.bytes_up += 0 if what is not None else content_bytes(reply.content)
        phase = {"train": now.train, "evaluate": now.evaluate}.get(kind)
        if phase is not None and what is not None:
            phase.failed[client] = what
        elif phase is not None:
            phase.replies[client] = _metrics(*reply.content.metric_records.values())
        now.ended = time.perf_counter()

    def end(self) -> None:
        """No more is coming."""
        if self._now is not None:
            now, self._now = self._now, None
            self._last = now.number
            self._on_round(now)

    @contextmanager
    def strategy_starts(self) -> Iterator[None]:
        """See every ``start`` of a strategy, also where a class has one of its own."""
        own = [cls for cls in _classes(Strategy) if "start" in cls.__dict__]  # type: ignore[type-abstract]
        before = {cls: cls.__dict__["start"] for cls in own}
        try:
            for cls, start in before.items():
                cls.start = self._seen(start)  # type: ignore[method-assign]
            yield
        finally:
            for cls, start in before.items():
                cls.start = start  # type: ignore[method-assign]

    def _seen(self, start: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(start)
        def seen(strategy: Strategy, *args: Any, **kwargs: Any) -> Any:
            if self._starting:  # called by the start of a subclass, or by one inside another
                return start(strategy, *args, **kwargs)
            given = inspect.signature(start).bind(strategy, *args, **kwargs)
            given.apply_defaults()
            self._began(strategy, given.arguments)
            try:
                with self._strategy_calls(strategy):
                    result = start(*given.args, **given.kwargs)
            finally:
                self._starting = False
                self.end()
            if isinstance(result, Result) and len(result.arrays):
                self.arrays = result.arrays
            return result

        return seen

    def _began(self, strategy: Strategy, arguments: dict[str, Any]) -> None:
        self._starting = True
        self.end()
        self._offset = self._last
        self.strategies.append(type(strategy).__name__)
        rounds, evaluate = arguments.get("num_rounds"), arguments.get("evaluate_fn")
        self.planned += rounds if isinstance(rounds, int) else 0
        if callable(evaluate):

            @functools.wraps(evaluate)
            def evaluated(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
                found: MetricRecord | None = evaluate(server_round, arrays)
                self._evaluated(server_round, found)
                return found

            arguments["evaluate_fn"] = evaluated

    def _evaluated(self, server_round: int, found: MetricRecord | None) -> None:
        if found is None:
            return
        if server_round == 0:
            self.initial = self.initial or _metrics(found)
            return
        now = self._enter(self._offset + server_round)
        now.server, now.ended = _metrics(found), time.perf_counter()

    @contextmanager
    def _strategy_calls(self, strategy: Strategy) -> Iterator[None]:
        """See in which round the strategy is, and what it aggregates."""
        names = ("configure_train", "configure_evaluate", "aggregate_train", "aggregate_evaluate")
        before = {name: strategy.__dict__[name] for name in names if name in strategy.__dict__}
        for name in names:
            strategy.__dict__[name] = self._called(name, getattr(strategy, name))
        try:
            yield
        finally:
            for name in names:
                del strategy.__dict__[name]
            strategy.__dict__.update(before)

    def _called(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def called(server_round: int, *args: Any, **kwargs: Any) -> Any:
            now = self._enter(self._offset + server_round)
            result = method(server_round, *args, **kwargs)
            if name == "aggregate_train":
                arrays, metrics = result
                self.arrays = arrays if arrays is not None else self.arrays
                now.train.aggregated = None if metrics is None else _metrics(metrics)
            elif name == "aggregate_evaluate":
                now.evaluate.aggregated = None if result is None else _metrics(result)
            now.ended = time.perf_counter()
            return result

        return called

    def _number(self, message: Message) -> int | None:
        """The round that a message belongs to: the strategy's, or what the message says."""
        if self._starting:
            return self._now.number if self._now else None
        for record in message.content.config_records.values():
            said = record.get("server-round")
            if isinstance(said, int) and said > 0:
                return self._offset + said
        group = message.metadata.group_id
        return self._offset + int(group) if group.isdecimal() and int(group) > 0 else None

    def _enter(self, number: int) -> Round:
        """The round of this number; the one before it is over."""
        if self._now is not None and self._now.number != number:
            self.end()
        if self._now is None:
            now = time.perf_counter()
            self._now = Round(number, now, now)
        return self._now


def _classes(cls: type[Strategy]) -> list[type[Strategy]]:
    return [cls, *(found for child in cls.__subclasses__() for found in _classes(child))]


def _metrics(*records: MetricRecord) -> Metrics:
    found: Metrics = {}
    for record in records:
        found.update({name: list(v) if isinstance(v, list) else v for name, v in record.items()})
    return found


def _scalar(replies: Mapping[int, Metrics], name: str) -> bool:
    return all(isinstance(own[name], int | float) for own in replies.values() if EXAMPLES in own)


def _mean(replies: Mapping[int, Metrics], name: str) -> float:
    counted = [own for own in replies.values() if EXAMPLES in own]
    total = sum(_float(own[EXAMPLES]) for own in counted)
    return sum(_float(own[EXAMPLES]) * _float(own[name]) for own in counted) / total if total else 0.0


def _float(value: float | list[float]) -> float:
    return value if isinstance(value, int | float) else float("nan")
