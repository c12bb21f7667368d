"""Actors that live as long as a run: who gets which task, and what happens when one of them is lost."""

import itertools
import os
import re
import sys
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import (
    ActorUnavailableError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)

from fedsim.engines.engine import Job
from fedsim.engines.folding import Part
from fedsim.engines.local.memory import packed, unpacked
from fedsim.engines.local.plan import Plan
from fedsim.engines.local.pool import DEATHS
from fedsim.engines.local.sharing import Range, scored, trained
from fedsim.engines.local.trainer import Task
from fedsim.engines.local.worker import READY, SLOTS
from fedsim.engines.ray.actor import versions
from fedsim.engines.ray.cluster import cpus, free_cpus
from fedsim.engines.ray.shell import actor_class
from fedsim.errors import FedsimError, RunError
from fedsim.records import Broadcast, CohortUpdate, Examples, Params
from fedsim.training.evaluate import Scores

START_S = 120.0  # a run without any actor waits so long for one to start: time to bring up a node
LOST = (RayActorError, ObjectLostError, OutOfMemoryError)


@dataclass(eq=False)
class _Actor:
    """An actor, the address of its node once it is ready, and what it has not answered, oldest first.

    orders: Ray's reference of the answer -> number of the task.
    """

    handle: Any
    node: str | None = None
    orders: dict[Any, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Asked:
    """What is wanted of the crew now, and how far it has got.

    sent: Ray's reference of the broadcast. states, key: see ``Cohorts.run_cohort``.
    waiting: numbers of tasks to hand out, in order. done: answers by number. losses: of actors, by task.
    """

    round: int
    sent: Any
    tasks: Sequence[Task | Range]
    states: Mapping[int, Params]
    key: int
    waiting: deque[int]
    done: dict[int, Any] = field(default_factory=dict)
    losses: Counter[int] = field(default_factory=Counter)

    def order(self, number: int) -> Any:
        """What an actor is sent."""
        task = self.tasks[number]
        clients = [] if isinstance(task, Range) else [client for block in task for client in block]
        return packed((task, {client: self.states[client] for client in clients if client in self.states}, self.key))


class Crew:
    """Cohorts trained by Ray actors. A context manager: leaving it ends them.

    Tasks are a function of the cohort, and parts are joined in the order of tasks, so results do not depend on the
    number of actors, on where they are, or on their speed. An actor that is lost is replaced and its tasks are done
    again.
    """

    def __init__(self, job: Job, plan: Plan, *, mixes: bool, actors: int) -> None:
        self._job, self._plan = job, plan
        self._class, self._given = actor_class(), ray.put(packed((job, plan, mixes)))
        self._stillborn, self._processors = 0, set[str]()
        self._actors: list[_Actor] = []
        self._actors += (self._started() for _ in range(actors))

    def __enter__(self) -> "Crew":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for actor in self._actors:
            _end(actor)

    def run_cohort(
        self, broadcast: Broadcast, clients: Sequence[int], states: Mapping[int, Params], key: int
    ) -> CohortUpdate:
        """See ``Cohorts.run_cohort``."""

        def train(asked: Sequence[Task]) -> Iterator[Part]:
            return itertools.chain.from_iterable(self._results(broadcast, asked, states, key))

        return trained(self._job, self._plan, broadcast, clients, train)

    def evaluate(self, broadcast: Broadcast, examples: Examples) -> Scores:
        """See ``Cohorts.evaluate``."""
        return scored(
            self._job, broadcast, examples, len(self._actors), lambda asked: self._results(broadcast, asked, {}, 0)
        )

    def _results(
        self, broadcast: Broadcast, asked: Sequence[Task | Range], states: Mapping[int, Params], key: int
    ) -> Iterator[Any]:
        """What each task comes to, in the order asked; handed out and heard as actors get free."""
        now = _Asked(broadcast.round, ray.put(packed(broadcast)), asked, states, key, deque(range(len(asked))))
        for number in range(len(asked)):
            while number not in now.done:
                self._hand_out(now)
                self._hear(now)
            result = now.done.pop(number)
            if isinstance(result, FedsimError):
                raise result
            yield result

    def _hand_out(self, now: _Asked) -> None:
        """Keep ``SLOTS`` tasks with every actor that is ready, a first one with each before a second one with any."""
        for busy in range(SLOTS):
            for actor in self._actors:
                if now.waiting and actor.node is not None and len(actor.orders) == busy:
                    number = now.waiting.popleft()
                    actor.orders[actor.handle.answer.remote(now.sent, now.order(number))] = number

    def _hear(self, now: _Asked) -> None:
        """Wait for one answer."""
        actors = {ref: actor for actor in self._actors for ref in actor.orders}
        manned = any(actor.node is not None for actor in self._actors)
        ready, _ = ray.wait(list(actors), timeout=None if manned else START_S)
        if not ready:
            have = f"the cluster has {cpus()} CPUs, {free_cpus()} of them free"
            raise RunError(f"round {now.round}: no actor could start within {START_S:g} s; {have}")
        actor = actors[ready[0]]
        try:
            found = unpacked(ray.get(ready[0]), copy=True)
        except RayTaskError as error:  # no fault of the task, whose errors come as answers
            raise RunError(f"node {error.ip}: {type(error.cause).__name__}: {error.cause}") from error
        except LOST as error:
            self._replace(actor, error, now)
            return
        number = actor.orders.pop(ready[0])
        if number == READY:
            actor.node, processor = introduced(found, self._processors)
            self._processors.add(processor)
            self._stillborn = 0
        else:
            now.done[number] = found

    def _replace(self, actor: _Actor, error: RayError, now: _Asked) -> None:
        """Start another actor for a lost one, and put its tasks back.

        Raises:
            RunError: it is the last of several that were lost over one task, or one of many that never got ready.
        """
        numbers, how = list(actor.orders.values()), _how(error)
        _end(actor)
        self._actors[self._actors.index(actor)] = self._started()
        if numbers[0] == READY:
            self._stillborn += 1
            if self._stillborn == DEATHS * len(self._actors):
                raise RunError(f"round {now.round}: actors are lost before they are ready, the last one by {how}")
            return
        now.losses[numbers[0]] += 1
        if now.losses[numbers[0]] == DEATHS:
            what = _named([now.tasks[numbers[0]]])
            raise RunError(f"round {now.round}: {DEATHS} actors were lost over {what}, the last one by {how}")
        what = _named([now.tasks[number] for number in numbers])
        lost = f"an actor on node {actor.node} was lost ({how})"
        warnings.warn(f"round {now.round}: {lost}; {what} are done again", stacklevel=2)
        now.waiting.extendleft(reversed(numbers))

    def _started(self) -> _Actor:
        """A new actor; it is ready when it has answered."""
        handle = self._class.remote([os.path.abspath(folder) for folder in sys.path], os.getcwd())  # noqa: PTH100, PTH109
        return _Actor(handle, orders={handle.begin.remote(self._given): READY})


def _end(actor: _Actor) -> None:
    """An actor keeps nothing that a kill could damage."""
    with suppress(RayError, ValueError):  # ValueError: it is gone already
        ray.kill(actor.handle)


def introduced(found: Any, processors: Set[str]) -> tuple[str, str]:
    """The node and processor of an actor that says it is ready.

    Args:
        found: what ``actor.begin`` says.
        processors: of the actors before it. Another kind is warned of.

    Raises:
        RunError: it is not ready, or what runs there is not what runs here.
    """
    if isinstance(found, FedsimError):
        raise found
    node, theirs, processor = found
    for what, own in versions().items():
        if theirs[what] != own:
            raise RunError(f"node {node} has {what} {theirs[what]}, but this machine {own}; they must be the same")
    if processors and processor not in processors:
        kinds = f"{processor}, those before it {', '.join(sorted(processors))}"
        told = f"node {node} has another processor ({kinds}): the last digits of results depend on which trained whom"
        warnings.warn(told, stacklevel=2)
    return node, processor


def _named(wanted: Sequence[Task | Range]) -> str:
    """Tasks in words."""
    clients = [client for task in wanted if not isinstance(task, Range) for block in task for client in block]
    if clients:
        return f"clients {min(clients)} to {max(clients)} ({len(clients)} of them)"
    return "scores of examples"


def _how(error: RayError) -> str:
    """What Ray's page of text comes to: "its node has died"."""
    if isinstance(error, ActorUnavailableError):
        return "it does not answer"
    found = re.search(r"\bbecause (.+?)(?:\.\s|\.?$)", str(error), re.MULTILINE)
    return found[1] if found else str(error).strip().partition("\n")[0]
