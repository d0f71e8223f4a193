"""A rank of a Team: joins the job, then runs the test functions that it is told to.

With an argument: the path of a unix socket for orders and answers, where mpirun has stdin and stdout.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

import roundel

faulthandler.enable()
faulthandler.register(signal.SIGUSR1, all_threads=True)


def main() -> None:
    if len(sys.argv) > 1:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(sys.argv[1])
        orders, answers = connection.makefile("r"), os.fdopen(os.dup(connection.fileno()), "w", buffering=1)
        rank = os.environ.get("PMI_RANK") or os.environ["OMPI_COMM_WORLD_RANK"]
        answers.write(f"{rank} {os.getpid()}\n")
    else:
        orders, answers = sys.stdin, os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever tests print goes to the log, not between the answers
    sys.path.insert(0, str(Path(__file__).parent))

    def attempt(action) -> None:
        error = ""
        try:
            action()
        except BaseException:
            error = traceback.format_exc()
        answers.write(json.dumps({"error": error}) + "\n")

    attempt(roundel.init)
    for line in orders:
        order = json.loads(line)

        def test(order=order) -> None:
            function = getattr(importlib.import_module(order["module"]), order["function"])
            function(roundel.communicator(), **order["arguments"])

        attempt(test)


if __name__ == "__main__":
    main()
