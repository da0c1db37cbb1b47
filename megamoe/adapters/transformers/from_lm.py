"""What train_lm.py saved as transformers' Qwen3-MoE, which is the same network: logits are equal.

Both are pre-norm, with normalised queries and keys, rotary positions that turn (i, i + dim/2), a softmax router whose
chosen weights are normalised, and SwiGLU experts. Ours joins q, k and v; theirs has grouped keys, here as many as
queries.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from megamoe.lm import checkpoint
from megamoe.lm.model import VOCABULARY


def is_run(path: Path) -> bool:
    """Whether ``path`` is, or holds, a checkpoint of train_lm.py."""
    try:
        checkpoint.read_state(checkpoint.find(path))
    except ValueError:
        return False
    return True


def load_run(path: Path) -> Any:
    """The newest checkpoint of a run as a transformers model in fp32 on the CPU, all experts.

    Raises:
        ValueError: a run whose router transformers' Qwen3-MoE can't express.
    """
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    file = checkpoint.find(path)
    options = checkpoint.read_state(file)["options"]
    if options["balance"] != "aux":
        raise ValueError(
            f"{file} was trained with --balance {options['balance']}, whose sigmoid router has a bias: "
            f"only runs with --balance aux can be generated from"
        )
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=options["hidden"],
        num_hidden_layers=options["layers"],
        num_attention_heads=options["heads"],
        num_key_value_heads=options["heads"],
        head_dim=options["hidden"] // options["heads"],
        moe_intermediate_size=options["intermediate"],
        num_experts=options["experts"],
        num_experts_per_tok=options["top_k"],
        norm_topk_prob=True,
        rms_norm_eps=torch.finfo(torch.float32).eps,  # what nn.RMSNorm takes where nothing is said
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    with safe_open(file, framework="pt") as tensors:
        state = {name: tensors.get_tensor(name) for name in tensors.keys() if not name.startswith("optimizer.")}  # noqa: SIM118
    model.load_state_dict(renamed(state, options["layers"], options["experts"]), strict=True)
    return model


def renamed(state: dict[str, torch.Tensor], layers: int, experts: int) -> dict[str, torch.Tensor]:
    """Tensors of a portable checkpoint under the names and in the shapes of ``Qwen3MoeForCausalLM``."""
    out = {
        "model.embed_tokens.weight": state["embed.weight"],
        "model.norm.weight": state["norm.weight"],
        "lm_head.weight": state["head.weight"],
    }
    for i in range(layers):
        ours, theirs = f"blocks.{i}.", f"model.layers.{i}."
        out[f"{theirs}input_layernorm.weight"] = state[f"{ours}attention_norm.weight"]
        out[f"{theirs}post_attention_layernorm.weight"] = state[f"{ours}moe_norm.weight"]
        parts = state[f"{ours}attention.qkv.weight"].chunk(3)
        out |= {f"{theirs}self_attn.{n}_proj.weight": part for n, part in zip("qkv", parts, strict=True)}
        out[f"{theirs}self_attn.o_proj.weight"] = state[f"{ours}attention.out.weight"]
        out |= {f"{theirs}self_attn.{n}_norm.weight": state[f"{ours}attention.{n}_norm.weight"] for n in "qk"}
        out[f"{theirs}mlp.gate.weight"] = state[f"{ours}moe.router.weight"]
        for name, key in (("gate_up_proj", "w13"), ("down_proj", "w2")):
            rows = [state[f"{ours}moe.experts.{e}.{key}"] for e in range(experts)]
            out[f"{theirs}mlp.experts.{name}"] = torch.stack(rows)
    return out
