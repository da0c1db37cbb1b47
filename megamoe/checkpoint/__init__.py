"""Saving and loading models whose experts are spread over ranks, with any number of ranks on either side."""

from megamoe.checkpoint.full import full_state_dict, load_full_state_dict
from megamoe.checkpoint.portable import init_optimizer_state, load_portable_state_dict, portable_state_dict
from megamoe.checkpoint.safetensors import load_safetensors, save_safetensors

__all__ = [
    "full_state_dict",
    "init_optimizer_state",
    "load_full_state_dict",
    "load_portable_state_dict",
    "load_safetensors",
    "portable_state_dict",
    "save_safetensors",
]
