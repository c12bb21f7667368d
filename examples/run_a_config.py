"""Run a federation from Python, look at its rounds, use its model. Run: python examples/run_a_config.py"""

from pathlib import Path

import torch

import fedsim

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"


def main() -> None:
    run = fedsim.run(CONFIG, {"train.rounds": 5, "name": "from-python"})
    for record in run.rounds:
        worst = record.client_accuracy_worst_tenth
        print(f"round {record.round}: accuracy {record.accuracy:.3f}, in the worst tenth of clients {worst:.3f}")

    model = run.model()  # a torch.nn.Module with the final global parameters
    blank = torch.zeros(1, 1, 8, 8)
    print(f"a blank image looks most like a {model(blank).argmax().item()}")

    longer = fedsim.resume(run.folder, rounds=8)  # go on where it stopped
    print(f"after {len(longer.rounds)} rounds: {longer.summary['accuracy']:.3f}, all in {longer.folder}")


if __name__ == "__main__":
    main()
