"""Imported by the fork server: finds out what the processor's vector units and the C++ compiler can do together.

Inductor compiles a small test for each of the instruction sets before its first kernel, once a machine: 6 s on an empty
cache, in which Python only waits. They pass in a thread while the server goes on importing; `_warm` waits for it, as
threads do not survive a fork.
"""

from __future__ import annotations

import threading

import torch._inductor.codecache  # noqa: F401  what the checks would import: not from two threads at once
from torch._inductor.cpu_vec_isa import valid_vec_isa_list

checks = threading.Thread(target=valid_vec_isa_list, name="instruction sets")
checks.start()
