"""Megatron-Core: ``use_megamoe`` puts our experts into the MoE layers of a layer spec. docs/megatron.md tells how.

Importing this package imports megatron-core, 0.16 or 0.19.
"""

from megamoe.adapters.megatron.layer import MegaMoELayer
from megamoe.adapters.megatron.limits import problem_of, why_not
from megamoe.adapters.megatron.spec import use_megamoe

__all__ = ["MegaMoELayer", "problem_of", "use_megamoe", "why_not"]
