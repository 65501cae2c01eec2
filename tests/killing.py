"""Runs that are killed from outside again and again, also while a checkpoint is being written."""

import subprocess
import time

import torch


def killed_and_resumed(command, folder, checkpoint, times=4):
    """Student weights of an undisturbed run and of one that was killed ``times`` times.

    ``command`` takes a program folder, in which it goes on from ``checkpoint``, and where to write its result.
    """
    whole, cut = folder / "whole", folder / "cut"
    results = [path.with_suffix(".pt") for path in (whole, cut)]
    subprocess.run([*command, str(whole), str(results[0])], check=True, timeout=300)
    for _ in range(times):
        victim = subprocess.Popen([*command, str(cut), str(results[1])])
        before = _written(cut / checkpoint)
        deadline = time.monotonic() + 120
        while victim.poll() is None and time.monotonic() < deadline:
            if _written(cut / checkpoint) != before:
                victim.kill()
                break
            time.sleep(0.001)
        victim.wait(timeout=60)
    subprocess.run([*command, str(cut), str(results[1])], check=True, timeout=300)
    return [torch.load(path, weights_only=True) for path in results]


def _written(path):
    return path.stat().st_mtime_ns if path.exists() else None
