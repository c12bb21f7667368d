"""A client on a machine of its own, as a Flower ClientApp: it answers the server's messages with its own data."""

import platform
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from fedsim import __version__
from fedsim.deploy import contents as c
from fedsim.deploy import settings
from fedsim.deploy.states import States
from fedsim.engines.flower import messages as m
from fedsim.params import all_finite
from fedsim.pruning.fitting import fitted
from fedsim.records import Broadcast, ClientEvaluation, Examples, Masks, Params
from fedsim.training import kept, masking
from fedsim.training.client import LocalWork, train_client
from fedsim.training.evaluate import score
from fedsim.transforms.outgoing import outgoing
from fedsim.transforms.transform import Compression


@dataclass(frozen=True)
class Participant:
    """One client: what it does, and what it holds.

    client: its number in the federation, >= 0. test: its held-out examples, may be none.
    compression: of its updates; None: they are sent as they are.
    own_data: the examples are its own, not a part of the server's split.
    settings: from its own config. states: where it keeps what its local rule needs from round to round.
    over: set when the server says that the run is over.
    say: prints a line for a person.
    """

    client: int
    work: LocalWork
    train: Examples
    test: Examples
    own_data: bool
    settings: settings.Settings
    states: States
    say: Callable[[str], None]
    compression: Compression | None = None
    over: threading.Event = field(default_factory=threading.Event)


def versions() -> str:
    """Of what changes numbers, in one line."""
    return f"fedsim {__version__}, torch {version('torch')}, Python {platform.python_version()}"


def client_app(of: Callable[[Context], Participant]) -> ClientApp:
    """Answers ``query.join``, ``train``, ``evaluate`` and ``query.end``.

    of: the participant that a context belongs to. What leaves it: the update, buffers and their numbers, how the model
        does on its held-out examples, and how many examples it has.
    """
    app = ClientApp()

    @app.query("join")
    def join(message: Message, context: Context) -> Message:
        return Message(c.member_content(_member(of(context), c.read_facts(message.content))), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(_train(of(context), message.content), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        who = of(context)
        facts = c.read_facts(message.content)
        _refuse_other_settings(who, facts)
        broadcast = m.read_train(message.content, partial(_known, who, facts))[0]
        state = who.states.before(facts.run, broadcast.round + 1, facts.since) or {}
        return Message(c.with_scores(RecordDict(), _scores(who, broadcast, broadcast.round, state)), reply_to=message)

    @app.query("end")
    def end(message: Message, context: Context) -> Message:
        who = of(context)
        who.say("the server says that the run is over")
        who.over.set()
        return Message(RecordDict(), reply_to=message)

    return app


def _member(who: Participant, facts: c.RunFacts) -> c.Member:
    differs = _differences(who, facts)
    for line in differs:
        who.say(f"cannot take part: {line}")
    if not differs:
        who.say(f"joined as client {who.client} with {len(who.train)} examples")
    return c.Member(who.client, len(who.train), who.own_data, versions(), tuple(differs))


def _train(who: Participant, content: RecordDict) -> RecordDict:
    """Evaluate the model as it comes, if asked to, and train it."""
    facts = c.read_facts(content)
    _refuse_other_settings(who, facts)
    broadcast, client, key = m.read_train(content, partial(_known, who, facts))
    if client != who.client:
        raise ValueError(f"got a message for client {client}, being {who.client}")
    held = who.states.before(facts.run, broadcast.round, facts.since)
    state = None if held is None else masking.without_known(held)
    scores = _scores(who, broadcast, broadcast.round - 1, state or {}) if facts.evaluate else None
    if state is None:
        state = who.work.rule.init(broadcast.params)
    work = replace(who.work, model=_model(who, broadcast))
    trained = train_client(work, broadcast, client, who.train, state=state, key=key)
    result = outgoing(who.compression, broadcast, trained, state, key)
    if not broadcast.probe and all_finite({**result.update, **result.state}):  # or the server leaves it out
        who.states.keep(facts.run, broadcast.round, {**result.state, **masking.remembered(broadcast.masks)})
    told = f"loss {result.metrics['train_loss']:.4f}"
    done = "gave its gradient" if broadcast.probe else "trained"
    who.say(f"round {broadcast.round}: {done} on {result.num_examples} examples, {told}")
    return c.with_scores(
        m.update_content(replace(result, state={}), None if broadcast.probe else broadcast.masks), scores
    )


def _model(who: Participant, broadcast: Broadcast) -> nn.Module:
    """The model that came: with fewer channels once the server has removed some."""
    return fitted(who.work.model, broadcast.params, tuple(who.train.inputs.shape[1:]))


def _known(who: Participant, facts: c.RunFacts, round: int) -> Masks | None:
    """The server's masks as this client had them when the round began."""
    return masking.known(who.states.before(facts.run, round) or {})


def _scores(who: Participant, broadcast: Broadcast, round: int, state: Params) -> ClientEvaluation | None:
    """The model that came, as this client has it, on its held-out examples."""
    if not len(who.test):
        return None
    own = kept.whole(who.work.model, who.work.kept, kept.Own(broadcast.params, broadcast.buffers), state)
    loss, accuracy = score(_model(who, broadcast), own.params, own.buffers, who.test).mean()
    return ClientEvaluation(round, who.client, len(who.test), loss, accuracy)


def _differences(who: Participant, facts: c.RunFacts) -> list[str]:
    return settings.differences(who.settings, settings.decode(facts.settings), own_data=who.own_data)


def _refuse_other_settings(who: Participant, facts: c.RunFacts) -> None:
    differs = _differences(who, facts)
    if differs:
        raise ValueError("; ".join(differs))
