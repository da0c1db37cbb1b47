"""The frame of a launch script: whatever happens to a rank ends in a sentence and an exit status."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable

import torch.distributed as dist

from megamoe.errors import MegaMoEError
from megamoe.leave import REFUSED
from megamoe.lm.world import World, join

Meet = Callable[[str], World]


class _Seat:
    """Where ``work`` leaves the world it has met."""

    world: World | None = None

    def __init__(self, launched: bool) -> None:
        self.launched = launched

    def meet(self, device: str) -> World:
        self.world = join(launched=self.launched, device=device)
        return self.world


def launch(program: str, work: Callable[[Meet], None], *, launched: bool, interrupted: str = "interrupted") -> int:
    """One rank of a call; the exit status: 0, 2 if ranks refuse what they were told, else 1 (130 for Ctrl-C).

    For ``megamoe.leave``, which ends the script. A rank that gives up keeps its group: others may be missing, and
    tidying up would wait for them.

    Args:
        program: name that a refusal begins with.
        work: all that is to be done; gets ``join`` for a device (auto, cpu or cuda) and calls it once, early.
        launched: whether torchrun, or one like it, has set RANK and the rest.
        interrupted: what to say after Ctrl-C.
    """
    seat, status = _Seat(launched), 1
    try:
        work(seat.meet)
        status = 0
    except ValueError as error:
        if seat.world is None or seat.world.rank == 0:  # all ranks refuse alike: see World.together
            print(f"{program}: {error}", file=sys.stderr, flush=True)
        status = REFUSED
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr, flush=True)
        status = 130
    except (MegaMoEError, OSError) as error:
        print(f"rank {seat.world.rank if seat.world else '?'} stops: {error}", file=sys.stderr, flush=True)
    except Exception:
        traceback.print_exc()
    if not status and seat.world is not None and seat.world.group is not None:
        dist.destroy_process_group()
    return status
