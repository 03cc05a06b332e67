"""First import of the fork server: leave the terminal before the heavy imports begin.

`Local` names this module first in the server's preloads and a log file in `QSWEEP_SERVER_LOG`. The server then writes
there what the imports say, and Ctrl-C in the terminal does not reach it. Without the variable nothing happens.
"""

from __future__ import annotations

import os

LOG = "QSWEEP_SERVER_LOG"


def _leave_terminal(log: str) -> None:
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    # Importing Inductor would start a pool of compilers: children of the server, shared by nobody.
    os.environ.setdefault("TORCH_WARM_POOL", "0")


if LOG in os.environ:
    _leave_terminal(os.environ.pop(LOG))
