"""Kills a sweep at random moments, again and again; a process of its own, because it forks.

python kill_loop.py FOLDER N ARGUMENTS: gives the command with `--out` FOLDER/0 until it ends by
itself, then with FOLDER/1, ... until it was killed N times and the last one has ended.
"""

import os
import random
import signal
import sys
import time

from experiments.__main__ import main

LONGEST_S = 1.5


def ends_by_itself(arguments, seconds):
    """Whether the command, begun in a fork, does so before it is killed."""
    child = os.fork()
    if not child:
        os._exit(main(arguments))
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0, arguments
            return True
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


if __name__ == "__main__":
    folder, n, *command = sys.argv[1:]
    draw = random.Random(0)
    kills = sweeps = 0
    while True:
        seconds = draw.uniform(0, LONGEST_S) if kills < int(n) else 600.0
        if not ends_by_itself([*command, "--out", f"{folder}/{sweeps}"], seconds):
            kills += 1
            continue
        sweeps += 1
        if kills == int(n):
            break
    print(kills, sweeps)
