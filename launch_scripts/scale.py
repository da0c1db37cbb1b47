#!/usr/bin/env python3
"""All GPUs of a machine in one command: ``python -m megamoe bench scale`` for launchers that start a script.

torchrun --standalone --nproc-per-node=8 launch_scripts/scale.py --out scale   # correctness, times, traces, a lost rank
python launch_scripts/scale.py --help                                          # all options
"""

import sys

from megamoe import cli
from megamoe.leave import leave

if __name__ == "__main__":
    leave(lambda: cli.main(["bench", "scale", *sys.argv[1:]]))
