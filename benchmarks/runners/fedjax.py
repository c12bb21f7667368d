"""The same federation in google/fedjax, with its own FedAvg, models in Haiku. Run: python -m runners.fedjax ...

``jit`` trains client after client, XLA using all cores for one; ``pmap`` trains as many at once as there are cores.
"""

import os
import time

from peers import CORES

from runners.task import Task, answer, parse

TASK: Task = parse("fedjax")
DEVICES = CORES if TASK.variant == "pmap" else 1
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"  # read when jax starts

import fedjax  # noqa: E402
import haiku as hk  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import numpy.typing as npt  # noqa: E402
import prepared  # noqa: E402
from fedjax.algorithms import fed_avg  # noqa: E402
from workloads import BATCH, CLASSES, LR  # noqa: E402


def forward(model: str, x: jax.Array, train: bool) -> jax.Array:
    """Logits (batch, classes) of flat inputs or images (batch, height, width, channels)."""
    if model == "cnn":
        for channels in (32, 64):
            x = jax.nn.relu(convolution(x, channels, 5, "SAME"))
            x = hk.max_pool(x, 2, 2, "VALID")
        return dense(x.reshape(len(x), -1), 512)
    if model == "pfl-cnn":
        x = jax.nn.relu(convolution(x, 32, 3, "VALID"))
        x = jax.nn.relu(convolution(x, 64, 3, "VALID"))
        x = hk.max_pool(x, 2, 2, "VALID")
        x = hk.dropout(hk.next_rng_key(), 0.25, x) if train else x
        return dense(x.reshape(len(x), -1), 128, dropout=0.5 if train else 0.0)
    return dense(x, *{"2nn": (200, 200), "linear": ()}[model])


def dense(x: jax.Array, *widths: int, dropout: float = 0.0) -> jax.Array:
    """Hidden layers of these widths with ReLU, then the logits."""
    for width in widths:
        x = jax.nn.relu(hk.Linear(width, **drawn_as_torch(x.shape[1]))(x))
        x = hk.dropout(hk.next_rng_key(), dropout, x) if dropout else x
    return hk.Linear(CLASSES, **drawn_as_torch(x.shape[1]))(x)


def convolution(x: jax.Array, channels: int, kernel: int, padding: str) -> jax.Array:
    """A square convolution."""
    return hk.Conv2D(channels, kernel, padding=padding, **drawn_as_torch(kernel**2 * x.shape[-1]))(x)


def drawn_as_torch(fan_in: int) -> dict[str, hk.initializers.RandomUniform]:
    """Torch's default: weights and biases uniform in ± 1 / sqrt(fan_in)."""
    uniform = hk.initializers.RandomUniform(-(fan_in**-0.5), fan_in**-0.5)
    return {"w_init": uniform, "b_init": uniform}


def images(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Channels last, as XLA wants them on a CPU; flat inputs stay."""
    return np.ascontiguousarray(np.moveaxis(x, 1, -1)) if x.ndim == 4 else x


def main() -> None:
    """Time the rounds."""
    workload, data = TASK.workload, prepared.load(TASK.workload)
    network = hk.transform(lambda batch, train=True: forward(workload.model, batch["x"], train))
    x, y, x_test = images(data.x), data.y.astype(np.int32), images(data.x_test)  # jax has no int64 by default
    model = fedjax.create_model_from_haiku(
        network,
        sample_batch={"x": x[:BATCH], "y": y[:BATCH]},
        train_loss=lambda batch, logits: -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["y"][:, None], 1)[:, 0],
        train_kwargs={"train": True},
        eval_kwargs={"train": False},
    )
    blocks = [prepared.block(workload, client) for client in range(workload.clients)]
    datasets = [fedjax.ClientDataset({"x": x[block], "y": y[block]}) for block in blocks]
    with fedjax.for_each_client_backend(TASK.variant):
        algorithm = fed_avg.federated_averaging(
            fedjax.model_grad(model),
            fedjax.optimizers.sgd(LR),
            fedjax.optimizers.sgd(1.0),
            fedjax.ShuffleRepeatBatchHParams(batch_size=BATCH, num_epochs=1),
        )
    state, seconds = algorithm.init(model.init(jax.random.PRNGKey(1))), []
    for number in range(TASK.total):
        began = time.perf_counter()
        cohort = prepared.cohort(workload, number)
        keys = jax.random.split(jax.random.PRNGKey(number), len(cohort))
        clients = [(client, datasets[client], key) for client, key in zip(cohort, keys, strict=True)]
        state, _ = algorithm.apply(state, clients)
        jax.block_until_ready(state.params)
        seconds.append(time.perf_counter() - began)
    predict = jax.jit(lambda params, x: model.apply_for_eval(params, {"x": x}).argmax(1))
    batches = [slice(i, i + 500) for i in range(0, len(x_test), 500)]
    accuracy = np.mean([predict(state.params, x_test[batch]) == data.y_test[batch] for batch in batches])
    packages = ("fedjax", "jax", "jaxlib", "dm-haiku", "numpy")
    answer(TASK, seconds, float(accuracy), processes=DEVICES, threads=CORES // DEVICES, packages=packages)


if __name__ == "__main__":
    main()
