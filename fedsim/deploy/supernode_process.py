"""What a SuperNode's process runs: Flower's own SuperNode, which ends when its parent has ended, whatever ended it."""

import atexit
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable

GRACE_S = 6.0  # to tell the server, before the whole group is killed
LOOK_S = 0.2


def main() -> None:
    """Run a SuperNode.

    Arguments: the parent's process id; a folder of this process's own, removed if the parent cannot do it; "quick" or
    "stock"; then those of ``flower-supernode``. The process must lead a group of its own.
    """
    parent, folder, pace, *arguments = sys.argv[1:]
    os.environ["FLWR_HOME"] = folder
    atexit.register(_clean, int(parent), folder)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # until Flower has its own
    threading.Thread(target=_end_with, args=(int(parent), folder), daemon=True).start()
    from flwr.supernode.cli.flower_supernode import flower_supernode  # noqa: PLC0415  takes a second: watch first

    if pace == "quick":
        _quicken()
    sys.argv = ["flower-supernode", *arguments]
    try:
        code = _code_of(flower_supernode)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        _clean(int(parent), folder)
    os._exit(code)  # whatever threads are left: one that has ended but stays would never be started again


def _code_of(run: Callable[[], None]) -> int:
    """The exit code of Flower's program. It interrupts itself when a server no longer knows its node."""
    try:
        run()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _quicken() -> None:
    from fedsim.deploy import interventions  # noqa: PLC0415  after the watch, too

    if interventions.fits("supernode"):
        from fedsim.deploy.interventions import supernode  # noqa: PLC0415  only where it fits

        supernode.quicken()
    else:
        print(f"warning: made for Flower {interventions.MADE_FOR}; with this one rounds are slower", flush=True)


def _end_with(parent: int, folder: str) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_S)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    _clean(parent, folder)


def _clean(parent: int, folder: str) -> None:
    """Leave nothing behind that the parent would have cleared away: files, and processes of the group."""
    if os.getppid() == parent:
        return
    shutil.rmtree(folder, ignore_errors=True)
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
