from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from tqdm import tqdm


@contextmanager
def forkable() -> Iterator[None]:
    """Trace and compile in the fork server so that no thread is left: threads do not survive a fork."""
    tqdm.monitor_interval = 0  # the compiler's progress bars would start one
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch._dynamo.reset()
    torch.set_num_threads(threads)
