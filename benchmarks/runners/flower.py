"""The same federation in Flower's own simulation, on Ray: a FedAvg ServerApp and ClientApps, one CPU for each client.

Run: python -m runners.flower ...
"""

import os
import time
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"  # Flower reads it once, when it is imported
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])  # where Ray's processes find the client

import prepared
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from peers import CORES

from runners import flower_client, torch_models
from runners.task import Task, answer, parse


class Strict(FedAvg):
    """FedAvg that does not go on without clients that failed."""

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate; refuse errors."""
        replies = list(replies)
        for reply in replies:
            if reply.has_error():
                raise RuntimeError(f"round {server_round}: a client failed: {reply.error.reason}")
        return super().aggregate_train(server_round, replies)


def server_app(task: Task) -> ServerApp:
    """A server that notes the time after each round, and answers."""
    app, workload = ServerApp(), task.workload

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        stamps: list[float] = []
        model = torch_models.build(workload.model)
        result = Strict(
            fraction_train=workload.cohort / workload.clients,
            fraction_evaluate=0.0,
            min_train_nodes=workload.cohort,
            min_available_nodes=workload.clients,
        ).start(
            grid,
            ArrayRecord(model.state_dict()),
            num_rounds=task.total,
            train_config=ConfigRecord({"workload": workload.name}),
            evaluate_fn=lambda number, arrays: stamps.append(time.perf_counter()),  # called before and after each round
        )
        model.load_state_dict(result.arrays.to_torch_state_dict())
        seconds = [after - before for before, after in pairwise(stamps)]
        accuracy = torch_models.accuracy(model, prepared.load(workload))
        packages = ("flwr", "ray", "torch", "numpy")
        answer(task, seconds, accuracy, processes=CORES, threads=1, packages=packages)

    return app


def main() -> None:
    """Simulate."""
    task = parse("flower")
    run_simulation(
        server_app=server_app(task),
        client_app=flower_client.app,
        num_supernodes=task.workload.clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": CORES, "include_dashboard": False},
        },
    )


if __name__ == "__main__":
    main()
