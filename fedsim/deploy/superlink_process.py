"""Runs one of Flower's programs for as long as the process that started it is there, whatever ends that one.

    python -m fedsim.deploy.superlink_process PARENT FOLDER PROGRAM [ARGUMENT ...]

FOLDER is the program's private folder. It is removed if the parent has gone and cannot do it.
"""

import atexit
import os
import shutil
import signal
import sys
import threading
import time
from importlib import metadata

LOOK_S, GRACE_S = 0.2, 3.0


def main() -> None:
    """Run the program in this process."""
    parent, folder = int(sys.argv[1]), sys.argv[2]
    sys.argv = sys.argv[3:]
    signal.signal(signal.SIGTERM, _end)  # so that what is registered for the end happens
    atexit.register(_clean, parent, folder)
    threading.Thread(target=_end_with, args=(parent, folder), daemon=True).start()
    (program,) = metadata.entry_points(group="console_scripts", name=sys.argv[0])
    sys.exit(program.load()())


def _end(*_: object) -> None:
    sys.exit(1)


def _end_with(parent: int, folder: str) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_S)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    _clean(parent, folder)
    os._exit(1)


def _clean(parent: int, folder: str) -> None:
    if os.getppid() != parent:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
