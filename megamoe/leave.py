"""The end of every program that may be a rank: launch scripts and ``python -m megamoe``.

Only their last lines call it, so that ``main`` of a command returns to whoever calls it: a test, or another program.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

import torch.distributed as dist

from megamoe import env

REFUSED = 2  # exit status of ranks that can't do what they were told


def leave(main: Callable[[], int]) -> NoReturn:
    """Run ``main`` and end this process with its status; at once, if it is a rank of a launch.

    With ranks missing, tidying up would wait for them. With all there, threads of torch.distributed that outlive its
    groups may meet an interpreter that is gone already ("terminate called without an active exception", seen once in
    some dozens of runs, in 3 of 15 on a busy machine); what waits for the end, such as processes to be
    joined, is heard before.
    """
    if not env.launched():
        sys.exit(main())
    status = _status(main)
    if status and dist.is_initialized():  # given up: ranks may be missing
        if dist.get_rank() == 0 or status == REFUSED:
            # The common store may live in rank 0's process, and the others still ask it who is gone. A refusal is told
            # by rank 0 alone, and torchrun ends it as soon as another rank is gone: it may come a little later.
            time.sleep(2)
    else:
        atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # a reader that is gone: what was said is lost, which is no success
        status = status or 1
    os._exit(status)


def _status(main: Callable[[], int]) -> int:
    """What the interpreter would do with the end of ``main``: its status, after a traceback if one is due."""
    try:
        return main()
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
