#!/usr/bin/env python3
"""Time whole MoE layers over ranks: ``python -m megamoe bench moe`` for launchers that start a script.

torchrun --standalone --nproc-per-node=2 launch_scripts/bench_moe.py --case qwen3 --recipe fp8_block   # a rank a GPU
python launch_scripts/bench_moe.py --help                                                             # all options
"""

import sys

from megamoe import cli
from megamoe.leave import leave

if __name__ == "__main__":
    leave(lambda: cli.main(["bench", "moe", *sys.argv[1:]]))
