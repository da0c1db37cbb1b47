"""``MegaMoELayer``: Megatron-Core's MoE layer with our dispatch and experts; all else is inherited."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

from megamoe.adapters.megatron.dispatcher import PassThroughDispatcher
from megamoe.adapters.megatron.limits import why_not


class MegaMoELayer(MoELayer):  # type: ignore[misc]  # megatron-core carries no types
    """A ``MoELayer``, so that TransformerLayer, recomputation and optimisers treat it as one.

    Router, balance losses, shared experts, latent projection and recomputation are the stock ones. ``forward`` is a
    collective of the expert-parallel group, and so is its replay under recomputation: every rank of the group runs the
    same layers in the same order.

    Args:
        config, submodules, layer_number, pg_collection, more: as for ``MoELayer``; ``submodules.experts`` builds
            ``MegaMoEExperts``.

    Raises:
        ValueError: the config asks for something our experts can't do (``why_not``).
    """

    def __init__(
        self,
        config: Any,
        submodules: Any = None,
        layer_number: int | None = None,
        pg_collection: Any = None,
        **more: Any,
    ) -> None:
        if reason := why_not(config):
            raise ValueError(reason)
        if pg_collection is None:
            pg_collection = get_default_pg_collection()
        super().__init__(config, submodules, layer_number, pg_collection, **more)
        self.token_dispatcher = PassThroughDispatcher(config, pg_collection)
