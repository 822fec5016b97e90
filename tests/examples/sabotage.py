"""``examples/train_gpt.py`` with an accident: ``python sabotage.py ACCIDENT ARGUMENTS...``.

``kill``: in the first attempt, rank 1 is killed while it writes its second checkpoint.
``full``: no file of a checkpoint may grow beyond 4 KiB, as on a full disk.
``slow``: every step takes a fifth of a second, so that a signal meets it half way.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from typing import Any

from torch.distributed.checkpoint import FileSystemWriter

from examples import train_gpt

accident, *arguments = sys.argv[1:]
write, writes = FileSystemWriter.write_data, 0


def killed(writer: FileSystemWriter, *args: Any) -> Any:
    global writes
    writes += 1
    if writes == 2 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return write(writer, *args)


def full(writer: FileSystemWriter, *args: Any) -> Any:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        return write(writer, *args)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def slowly(*args: Any, **kwargs: Any) -> Any:
    time.sleep(0.2)
    return batch(*args, **kwargs)


batch = train_gpt.batch_of
if accident == "kill":
    FileSystemWriter.write_data = killed  # type: ignore[method-assign]
elif accident == "full":
    FileSystemWriter.write_data = full  # type: ignore[method-assign]
elif accident == "slow":
    train_gpt.batch_of = slowly
sys.exit(train_gpt.main(arguments))
