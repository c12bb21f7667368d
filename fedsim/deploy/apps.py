"""The two apps that Flower's own processes load by name, on its supported path: there is nothing else in the FAB."""

import functools
import json
import os
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedsim.deploy import relay
from fedsim.deploy.joining import participant
from fedsim.deploy.participation import Participant
from fedsim.deploy.participation import client_app as participation

CLIENT = "FEDSIM_CLIENT"  # environment variable: how ``fedsim client`` was called, as JSON


@functools.cache
def _participant() -> Participant:
    torch.set_num_threads(1)  # as in ``fedsim client``
    given: dict[str, Any] = json.loads(os.environ[CLIENT])
    return participant(
        Path(given["config"]),
        given["overrides"],
        partition=given["partition"],
        own_data=given["own_data"],
        states=Path(given["states"]),
        say=lambda line: print(line, flush=True),
    )


def _of(context: Context) -> Participant:
    return _participant()


client_app = participation(_of)  # plainly: Flower looks for the name in the text of this file
server_app = ServerApp()


@server_app.main()
def _main(grid: Grid, context: Context) -> None:
    relay.answer(grid, context)
