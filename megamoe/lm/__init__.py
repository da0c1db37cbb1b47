"""A small byte-level language model with expert-parallel feed-forward layers, for launch_scripts/train_lm.py."""
