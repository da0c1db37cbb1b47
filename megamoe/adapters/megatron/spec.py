"""Layer specs with our experts in them, for every shape of spec that Megatron-Core builds in 0.16 and 0.19."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from typing import Any

from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec

from megamoe.adapters.megatron.experts import MegaMoEExperts
from megamoe.adapters.megatron.layer import MegaMoELayer
from megamoe.adapters.megatron.limits import MAX_TOKENS, why_not


def use_megamoe(
    spec: Any,
    config: Any,
    *,
    engine: str = "auto",
    max_tokens: int = MAX_TOKENS,
    fallback: bool = True,
    pg_collection: Any = None,
) -> Any:
    """A copy of ``spec`` whose MoE layers are ``MegaMoELayer``; ``spec`` itself stays as it is.

    Args:
        spec: what ``get_gpt_layer_local_spec``, ``get_gpt_layer_with_transformer_engine_spec``,
            ``get_gpt_decoder_block_spec`` and their like return.
        config: the model's ``TransformerConfig``.
        engine: as in ``mega_moe``.
        max_tokens: bound on the tokens of one rank in one call: micro-batch * sequence / (tensor and context ranks).
        fallback: if ``config`` asks for something our experts can't do, warn with the sentence and return ``spec``
            with its stock layers; False raises instead.
        pg_collection: process groups of the model, where they are not those of ``parallel_state``: Megatron-Core 0.16
            hands them on to its own MoE layer only.

    Raises:
        ValueError: no MoE layer in ``spec``; or, without ``fallback``, what ``why_not`` says.
    """
    if reason := why_not(config):
        if not fallback:
            raise ValueError(reason)
        warnings.warn(f"{reason}. The stock MoE layer runs instead.", stacklevel=2)
        return spec
    options = {"engine": engine, "max_tokens": max_tokens}
    result = _replaced(spec, options, {} if pg_collection is None else {"pg_collection": pg_collection})
    if result is spec:
        raise ValueError(f"spec holds no MoE layer: got {spec!r}; build it with num_experts")
    return result


def _replaced(spec: Any, options: dict[str, Any], groups: dict[str, Any]) -> Any:
    """``spec`` itself if nothing in it is a stock MoE layer, else a copy with the replacements."""
    again = functools.partial(_replaced, options=options, groups=groups)
    if isinstance(spec, functools.partial):
        if spec.func is not MoELayer:
            keywords = {name: again(value) for name, value in spec.keywords.items()}
            same = all(keywords[name] is value for name, value in spec.keywords.items())
            return spec if same else functools.partial(spec.func, *spec.args, **keywords)
        keywords = {**spec.keywords, "submodules": _with_our_experts(spec.keywords["submodules"], options)}
        return functools.partial(MegaMoELayer, *spec.args, **keywords)
    if isinstance(spec, ModuleSpec) and spec.module is MoELayer:
        submodules = _with_our_experts(spec.submodules, options)
        params = {**spec.params, **groups}
        return dataclasses.replace(spec, module=MegaMoELayer, submodules=submodules, params=params)
    if isinstance(spec, list | tuple):
        items = [again(item) for item in spec]
        same = all(new is old for new, old in zip(items, spec, strict=True))
        return spec if same else type(spec)(items)
    if dataclasses.is_dataclass(spec) and not isinstance(spec, type):
        fields = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec) if f.init}
        changed = {name: new for name, value in fields.items() if (new := again(value)) is not value}
        return dataclasses.replace(spec, **changed) if changed else spec
    return spec


def _with_our_experts(submodules: Any, options: dict[str, Any]) -> Any:
    """``MoESubmodules`` whose experts are ours, in the version's own form and with the stock checkpoint names."""
    stock = submodules.experts
    module = stock.func if isinstance(stock, functools.partial) else getattr(stock, "module", stock)
    params = {**options, "grouped_keys": module is TEGroupedMLP}
    if isinstance(stock, ModuleSpec):
        return dataclasses.replace(submodules, experts=ModuleSpec(module=MegaMoEExperts, params=params))
    return dataclasses.replace(submodules, experts=functools.partial(MegaMoEExperts, **params))
