#!/usr/bin/env python3
"""Generate text with a Hugging Face MoE model, its experts spread over ranks: texts, tokens per second, latencies.

torchrun --standalone --nproc-per-node=2 launch_scripts/generate.py --layers 4 --experts megamoe eager grouped_mm
python launch_scripts/generate.py --tiny                                                     # one rank, on any CPU

Needs transformers (5.17 to 5.23). docs/generation.md tells what happens inside.
"""

from megamoe import env
from megamoe.generate.main import main
from megamoe.leave import leave

if __name__ == "__main__":
    leave(lambda: main(launched=env.launched()))
