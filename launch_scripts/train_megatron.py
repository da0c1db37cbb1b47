#!/usr/bin/env python3
"""Train a small byte-level GPT with experts through Megatron-Core: its own MoE layer, or ours, by --moe.

torchrun --standalone --nproc-per-node=2 launch_scripts/train_megatron.py --moe megamoe     # or --moe stock; --help

Needs megatron-core 0.16 or 0.19 and triton; runs on CPUs over gloo and on GPUs. docs/megatron.md tells more.
"""

import importlib.util
import sys

from megamoe import env

if __name__ == "__main__":
    if not env.launched():
        sys.exit(
            "train_megatron.py: start with torchrun --standalone --nproc-per-node=N launch_scripts/train_megatron.py"
        )
    if importlib.util.find_spec("megatron") is None:
        sys.exit("train_megatron.py: needs megatron-core 0.16 or 0.19: pip install megatron-core")
    from megamoe.adapters.megatron.train import main
    from megamoe.leave import leave

    leave(main)
