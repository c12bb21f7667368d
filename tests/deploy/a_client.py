"""A client with an app that adds one: a_client.py ADDRESS PARTITION STATE CERTS|- [stock]. Flower reads it, too."""

import sys
import threading
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp

app, over = ClientApp(), threading.Event()


@app.train()
def train(message, context):
    time.sleep(message.content["config"]["seconds"])
    array = message.content["arrays"]["x"].numpy() + np.uint8(1 + context.node_config["partition-id"])
    return Message(RecordDict({"arrays": ArrayRecord({"x": Array(array)})}), reply_to=message)


@app.query("fail")
def fail(message, context):
    raise ZeroDivisionError("no examples")


@app.query("end")
def end(message, context):
    over.set()
    return Message(RecordDict(), reply_to=message)


def main():
    from fedsim.deploy.address import Address
    from fedsim.deploy.certificates import client_files
    from fedsim.deploy.client import run_client

    address, partition, state, certs, *stock = sys.argv[1:]
    run_client(
        app,
        Address.parse(address, "--server"),
        None if certs == "-" else client_files(Path(certs), int(partition)),
        partition=int(partition),
        say=lambda line: print(line, flush=True),
        state=Path(state),
        until=over,
        stock=bool(stock),
        wait_s=60,
    )


if __name__ == "__main__":
    main()
