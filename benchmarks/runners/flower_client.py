"""The client of the Flower federation, in a module of its own because Ray's processes import it."""

from functools import cache

import prepared
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from workloads import WORKLOADS

from runners.bare import Loop

app = ClientApp()


@cache
def kept(workload: str) -> Loop:
    """Model and data, made once in each of Ray's processes; Flower's tutorials make them again for every message."""
    torch.set_num_threads(1)
    return Loop(WORKLOADS[workload], prepared.load(WORKLOADS[workload]))


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train on the examples of the node's partition, with the very epoch of the bare loop."""
    loop = kept(str(message.content["config"]["workload"]))
    loop.model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    block = prepared.block(loop.workload, int(context.node_config["partition-id"]))
    loop.model.train()
    loop.train(loop.x[block], loop.y[block])
    arrays, metrics = ArrayRecord(loop.model.state_dict()), MetricRecord({"num-examples": len(loop.y[block])})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
