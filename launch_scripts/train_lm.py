#!/usr/bin/env python3
"""Train a small byte-level language model whose experts are spread over ranks, on text that every machine has.

torchrun --standalone --nproc-per-node=2 launch_scripts/train_lm.py     # two ranks; --help lists what can be changed
python launch_scripts/train_lm.py                                       # one rank, no launcher

docs/training-a-language-model.md tells what happens inside.
"""

from megamoe import env
from megamoe.leave import leave
from megamoe.lm.main import main

if __name__ == "__main__":
    leave(lambda: main(launched=env.launched()))
