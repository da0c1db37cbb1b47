"""Language models to generate with: known sizes with random weights, a checkpoint directory, what train_lm.py saved."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from megamoe.adapters.transformers.forms import is_experts
from megamoe.adapters.transformers.from_lm import is_run, load_run
from megamoe.adapters.transformers.parallel import keep_part, parallel_arguments
from megamoe.lm.world import World

# transformers' configuration class and the model's published sizes (config.json of the model on the Hub).
KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-30b": (
        "Qwen3MoeConfig",
        dict(
            vocab_size=151936, hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4,
            head_dim=128, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True,
            max_position_embeddings=40960, rms_norm_eps=1e-6,
        ),
    ),
    "gpt-oss-20b": (
        "GptOssConfig",
        dict(
            vocab_size=201088, hidden_size=2880, num_hidden_layers=24, num_attention_heads=64, num_key_value_heads=8,
            head_dim=64, intermediate_size=2880, num_local_experts=32, num_experts_per_tok=4, sliding_window=128,
        ),
    ),
    "mixtral-8x7b": (
        "MixtralConfig",
        dict(
            vocab_size=32000, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
            intermediate_size=14336, num_local_experts=8, num_experts_per_tok=2, rms_norm_eps=1e-5,
        ),
    ),
}  # fmt: skip
# What --tiny replaces, where the configuration has it: the same model, small enough for a CPU.
TINY = dict(
    vocab_size=256, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    intermediate_size=32, moe_intermediate_size=32, num_experts=8, num_local_experts=8, num_experts_per_tok=2,
)  # fmt: skip
TINY_LAYERS = 2


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model with only this rank's experts, and how text becomes tokens; None where it has no text."""

    model: Any
    name: str
    vocabulary: int
    stop: frozenset[int]
    encode: Callable[[str], list[int]] | None
    decode: Callable[[list[int]], str] | None


def version() -> str:
    """Of transformers."""
    import transformers

    return str(transformers.__version__)


def make_cache() -> Any:
    """An empty key-value cache that grows, the same kind in every layer: sliding windows are the mask's business."""
    from transformers import DynamicCache

    return DynamicCache()


def load(source: str, world: World, *, layers: int | None, tiny: bool, dtype: torch.dtype, seed: int) -> Loaded:
    """The model ``source`` names, on ``world.device``, in evaluation mode.

    Args:
        source: a name of ``KNOWN``; a directory with transformers' ``config.json``; a checkpoint or run of train_lm.py.
        world: the ranks.
        layers: keep so many transformer layers of a known model; None: all, or ``TINY_LAYERS`` if ``tiny``.
        tiny: scale a known model down to ``TINY``.
        dtype: of the weights.
        seed: of random weights; the same on all ranks, whatever their number.

    Raises:
        ValueError: no such model, or a choice that does not apply to it.
    """
    path = Path(source)
    if source in KNOWN:
        return _random(source, world, layers=layers, tiny=tiny, dtype=dtype, seed=seed)
    if layers is not None or tiny:
        raise ValueError(f"--layers and --tiny change the sizes of {', '.join(KNOWN)}; {source} has sizes of its own")
    if (path / "config.json").is_file():
        return _directory(path, world, dtype)
    if is_run(path):
        model = load_run(path).to(world.device, dtype).eval()
        _keep_parts(model, world)
        return Loaded(
            model=model, name="train_lm", vocabulary=256, stop=frozenset(),
            encode=lambda text: list(text.encode()), decode=lambda ids: bytes(ids).decode(errors="replace"),
        )  # fmt: skip
    raise ValueError(
        f"--model must be one of {', '.join(KNOWN)}, a directory with a config.json, or a run of train_lm.py, "
        f"got {source}"
    )


def _random(name: str, world: World, *, layers: int | None, tiny: bool, dtype: torch.dtype, seed: int) -> Loaded:
    import transformers

    kind, sizes = KNOWN[name]
    if tiny:
        sizes = sizes | {key: value for key, value in TINY.items() if key in sizes}
        layers = layers or TINY_LAYERS
    if layers is not None:
        sizes = sizes | {"num_hidden_layers": layers}
    config = getattr(transformers, kind)(**sizes)
    torch.manual_seed(seed)
    with torch.device(world.device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    _keep_parts(model, world)
    label = f"{name}{'-tiny' if tiny else ''}-{config.num_hidden_layers}-layers"
    vocabulary = config.vocab_size
    return Loaded(model=model, name=label, vocabulary=vocabulary, stop=frozenset(), encode=None, decode=None)


def _directory(path: Path, world: World, dtype: torch.dtype) -> Loaded:
    """Each rank reads its own experts, where transformers puts a spread model onto the device that is wanted."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path)
    wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if world.size > 1 and world.device.type == wanted and getattr(config, "base_model_ep_plan", None):
        arguments = parallel_arguments(config, world.size, data_parallel=True)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **arguments)
        for module in model.modules():
            if is_experts(module):
                _as_plain(module)
    else:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, config=config)
        _keep_parts(model, world)
    model = model.to(world.device).eval()
    generation = getattr(model, "generation_config", None)
    end = getattr(generation, "eos_token_id", None)
    stop = frozenset([end] if isinstance(end, int) else end or [])
    tokenizer = None
    if any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(path)
    return Loaded(
        model=model,
        name=path.resolve().name,
        vocabulary=config.get_text_config().vocab_size,
        stop=stop,
        encode=None if tokenizer is None else (lambda text: list(tokenizer(text)["input_ids"])),
        decode=None if tokenizer is None else tokenizer.decode,
    )


def _as_plain(module: nn.Module) -> None:
    """Shards as plain parameters, and the module's own call again: who moves tokens is chosen later."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        if isinstance(parameter, DTensor):
            module.register_parameter(name, nn.Parameter(parameter.to_local().detach()))
    with contextlib.suppress(AttributeError):
        del module.forward


def _keep_parts(model: nn.Module, world: World) -> None:
    for name, module in model.named_modules():
        if is_experts(module) and world.size > 1:
            if int(module.num_experts) % world.size:
                raise ValueError(f"{name} has {module.num_experts} experts, not divisible by {world.size} ranks")
            keep_part(module, world.rank, world.size)
