"""transformers' key-value cache with fixed memory: every row takes its next token at a column of its own.

What a decode step needs to be captured in a CUDA graph: no tensor grows, and where things go is read on the device.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

_ATTENTION = ("sdpa", "eager")  # these read a mask [B, 1, 1, W]


def why_no_rows(config: Any) -> str | None:
    """None if models of ``config`` run with this cache, else a sentence."""
    kind = getattr(config, "_attn_implementation", None)
    if kind not in _ATTENTION:
        return f"attention must be one of {', '.join(_ATTENTION)} for caches of fixed size, got {kind}"
    return None


class RowLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is not always there to check against
    """One layer.

    Attributes:
        keys, values: [rows, heads, W, dim], made by the first prompts that join.

    Args:
        columns: int64 [rows], the column of each row's next token; shared by all layers.
        width: W.
    """

    def __init__(self, columns: torch.Tensor, width: int) -> None:
        super().__init__()
        self._columns, self._width = columns, width

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Memory for ``rows`` rows like those of the given [B, heads, *, dim]."""
        rows = len(self._columns)
        for name, like in (("keys", key_states), ("values", value_states)):
            setattr(self, name, like.new_zeros(rows, like.shape[1], self._width, like.shape[3]))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One token [n, heads, 1, dim] for each of the first n rows -> all columns of these rows."""
        n = key_states.shape[0]
        column = self._columns[:n].view(n, 1, 1, 1)
        for kept, new in ((self.keys, key_states), (self.values, value_states)):
            kept[:n].scatter_(2, column.expand(n, kept.shape[1], 1, kept.shape[3]), new)
        return self.keys[:n], self.values[:n]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(W, 0): the mask is handed in."""
        return self._width, 0

    def get_seq_length(self) -> int:
        """0: positions are handed in."""
        return 0

    def get_max_length(self) -> int:
        """W."""
        return self._width


def make_row_cache(num_layers: int, columns: torch.Tensor, width: int) -> Any:
    """A ``Cache`` of ``RowLayer``s."""
    return Cache(layers=[RowLayer(columns, width) for _ in range(num_layers)])


def row_mask(config: Any, columns: torch.Tensor, width: int, dtype: torch.dtype) -> Any:
    """What attention may see of W columns, as ``attention_mask`` of a model of ``config``.

    Args:
        columns: int64 [n], the column of each row's new token, the last that it sees.

    Returns:
        [n, 1, 1, W], 0 or the least number of ``dtype``; a dict by kind of layer where only some have a window.
    """
    place = torch.arange(width, device=columns.device)
    ahead = place > columns[:, None]
    window = getattr(config, "sliding_window", None)

    def mask(hidden: torch.Tensor) -> torch.Tensor:
        zeros = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        return zeros.masked_fill(hidden, torch.finfo(dtype).min)[:, None, None]

    near = mask(ahead | (place <= columns[:, None] - window)) if window else None
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()) and near is not None:
        return {"full_attention": mask(ahead), "sliding_attention": near}
    return mask(ahead) if near is None else near
