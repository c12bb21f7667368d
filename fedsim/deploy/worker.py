"""Does the tasks of this machine's SuperNode in this process, with a model and data that stay loaded."""

from collections.abc import Callable
from typing import Any

from flwr.app import Error, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

REASON_LENGTH = 2000


def step(runtime: Any, app: ClientApp, say: Callable[[str], None]) -> bool:
    """Do one task if there is one.

    The app is the one that is given: code that comes with a run is never loaded. What the app raises becomes an error
    reply; ``KeyboardInterrupt`` and ``SystemExit`` pass through, and the server hears nothing.

    Args:
        runtime: ``interventions.client.Runtime``, or the like.
        app: answers messages.
        say: prints a line for a person.

    Returns:
        Whether there was one.

    Raises:
        httpx.HTTPError, RuntimeError: the SuperNode is gone, or does not take part as it should.
    """
    with runtime.task() as task:
        if task is None:
            return False
        message, context = task.pull()
        try:
            reply, failure = _checked(app(message, context), message), ""
        except Exception as error:  # whatever it is: the sender decides what a failed client means
            failure = f"{type(error).__name__}: {error}"[:REASON_LENGTH]
            reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, failure), reply_to=message)
            say(f"{message.metadata.message_type} failed: {failure}")
        task.push(reply, failure)
        return True


def _checked(reply: object, message: Message) -> Message:
    if not isinstance(reply, Message):
        raise TypeError(f"a client app must return a Message, got {type(reply).__name__}")
    if reply.metadata.reply_to_message_id != message.metadata.message_id:
        raise ValueError("a client app must return a reply to the message it got")
    return reply
