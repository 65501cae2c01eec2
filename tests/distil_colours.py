"""The run of ``colours`` as a process of its own, which may kill itself at a chosen moment; see ``launched``."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

PLACES = ("in a step", "while a checkpoint is written", "before it takes its place", "after that")


def launched(folder, *, changes=None, processes=1, kill=None, output=None):
    """Run to the end, or to where it is killed; returns the exit codes of the processes.

    Args:
        changes: of the configuration.
        kill: one of PLACES and the how manieth time.
        output: where the first process writes the weights.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    arguments = json.dumps([str(folder), changes or {}, kill, None if output is None else str(output)])
    together = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    here = Path(__file__)
    started = []
    for rank in range(processes):
        environment = {**os.environ, **together, "RANK": str(rank), "PYTHONPATH": str(here.parent.parent)}
        started.append(subprocess.Popen([sys.executable, here, arguments], env=environment))
    try:
        return [process.wait(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()


def main(folder, changes, kill, output):
    import dataclasses

    import torch
    from colours import QUICK, distill, images, program

    if kill is not None:
        arm(*kill)
    net = program()
    distill(net, images(), None, dataclasses.replace(QUICK, **changes), folder=Path(folder), resume=True)
    if output is not None and os.environ["RANK"] == "0":
        torch.save(net.student.state_dict(), output)


def arm(place, number):
    """Die at the ``number``-th time of ``place``."""
    import torch

    from anncvt import files
    from anncvt.distillation import checkpoint
    from anncvt.distillation.optimizers import Descent

    left = [number]

    def count():
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(owner, name, before=False):
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            if before:
                count()
            result = original(*args, **kwargs)
            if not before:
                count()
            return result

        setattr(owner, name, wrapped)

    if place == "in a step":
        around(Descent, "step", before=True)
    elif place == "while a checkpoint is written":
        whole = torch.save

        def half(state, file):
            whole(state, file)
            if left[0] == 1:
                file.flush()
                os.truncate(file._file.name, 1000)
            count()

        torch.save = half
    elif place == "before it takes its place":
        around(files.os, "replace", before=True)
    else:
        around(checkpoint, "write")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(*json.loads(sys.argv[1]))
