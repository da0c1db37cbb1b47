"""The experts of a model's layers, found by the names of its tensors, and one expert read or written in any format.

Names of one expert's matrices (``prefix`` ends before ``experts.``):

- ``proj``: ``{prefix}experts.7.gate_proj.weight``, ``up_proj``, ``down_proj`` (most models);
- ``w123``: ``{prefix}experts.7.w1.weight`` gate, ``w3`` up, ``w2`` down (Mixtral, DeepSeek-V4);
- ``gpt_oss``: all experts in one tensor, ``{prefix}experts.gate_up_proj_blocks`` and so on: its own format.

A bias is ``{...}gate_proj.bias``; in gpt-oss ``gate_up_proj_bias``.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

import torch

from megamoe.kernels.quant.mxfp4 import ScaleChoice
from megamoe.pretrained.encodings import ENCODINGS, Encoding
from megamoe.pretrained.files import TensorFiles
from megamoe.pretrained.matrix import Form, Matrix, to_nvfp4, to_recipe
from megamoe.pretrained.stacked import GPT_OSS, Biases, GptOss, is_stacked

Naming = Literal["proj", "w123"]
PROJECTIONS: dict[Naming, tuple[str, str, str]] = {
    "proj": ("gate_proj", "up_proj", "down_proj"),
    "w123": ("w1", "w3", "w2"),
}
"""Names of gate, up and down."""
FORMATS = (*(encoding.name for encoding in ENCODINGS), GPT_OSS)
"""Names of all formats that can be read and written."""
_EXPERT = re.compile(r"^((?:.*\.)?)experts\.(\d+)\.(gate_proj|up_proj|down_proj|w[123])\.(\w+)$")
_STACKED = re.compile(r"^((?:.*\.)?)experts\.((?:gate_up|down)_proj_\w+)$")


KINDS = ("gate", "up", "down")
"""Matrices of an expert, in the order used everywhere here."""


@dataclass(frozen=True)
class Expert:
    """One expert as a checkpoint stores it: gate and up [I, H], down [H, I]; biases [I], [I], [H], or None."""

    matrices: tuple[Matrix, Matrix, Matrix]
    biases: Biases | None = None


@dataclass(frozen=True)
class MoeLayer:
    """One layer's experts: where, how many, in which format."""

    prefix: str
    num_experts: int
    naming: Naming
    format: Encoding | GptOss
    names: tuple[str, ...]
    """Of all tensors that belong to it."""
    bias: bool

    @property
    def format_name(self) -> str:
        """One of ``FORMATS``."""
        return self.format.name

    def sizes(self, files: TensorFiles, expert: int = 0) -> tuple[int, int]:
        """(H, I), from the headers of ``expert``'s tensors. Raises ValueError if its three matrices do not fit."""
        if isinstance(self.format, GptOss):
            return self.format.sizes(files, self.prefix, self.num_experts)
        stems = [f"{self.prefix}experts.{expert}.{name}." for name in PROJECTIONS[self.naming]]
        gate, up, down = (self.format.shape(files, stem) for stem in stems)
        if up != gate or down != gate[::-1]:
            raise ValueError(
                f"{stems[0]}* of {gate[0]} x {gate[1]} needs {stems[1]}* of the same shape and {stems[2]}* of "
                f"{gate[1]} x {gate[0]}, got {up[0]} x {up[1]} and {down[0]} x {down[1]}, in {files.path}"
            )
        return gate[1], gate[0]

    def read(self, files: TensorFiles, expert: int) -> Expert:
        """One expert; nothing of the others is read."""
        hidden, inter = self.sizes(files, expert)
        if isinstance(self.format, GptOss):
            return Expert(*self.format.read(files, self.prefix, expert, bias=self.bias))
        stems = [f"{self.prefix}experts.{expert}.{name}." for name in PROJECTIONS[self.naming]]
        gate, up, down = (self.format.read(files, stem) for stem in stems)
        if not self.bias:
            return Expert((gate, up, down))
        biases = []
        for stem, size in zip(stems, (inter, inter, hidden), strict=True):
            info = files.info(f"{stem}bias")
            if info.shape != (size,):
                raise ValueError(f"{info} must have shape ({size},), got {info.shape}")
            biases.append(files.read(info.name))
        return Expert((gate, up, down), (biases[0], biases[1], biases[2]))


def find_layers(files: TensorFiles) -> list[MoeLayer]:
    """All layers with experts, in order of their names' numbers; only names are looked at.

    Raises:
        ValueError: no experts; an expert, projection or scale that is missing; tensors beside the weights that no
            format knows.
    """
    single: dict[str, dict[int, dict[str, set[str]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(set)))
    stacked: dict[str, set[str]] = defaultdict(set)
    for name in files.names:
        if match := _EXPERT.match(name):
            prefix, expert, projection, suffix = match.groups()
            single[prefix][int(expert)][projection].add(suffix)
        elif (match := _STACKED.match(name)) and is_stacked(match[2]):
            stacked[match[1]].add(match[2])
    layers = [_single_layer(files, prefix, experts) for prefix, experts in single.items()]
    layers += [_stacked_layer(files, prefix, suffixes) for prefix, suffixes in stacked.items()]
    if not layers:
        raise ValueError(
            f"{files.path} holds no experts under the names this package knows "
            "(experts.0.gate_proj.weight, experts.0.w1.weight, experts.gate_up_proj_blocks, ...)"
        )
    return sorted(layers, key=lambda layer: [int(n) for n in re.findall(r"\d+", layer.prefix)])


def _single_layer(files: TensorFiles, prefix: str, experts: dict[int, dict[str, set[str]]]) -> MoeLayer:
    naming: Naming = "w123" if any(p.startswith("w") for p in experts[next(iter(experts))]) else "proj"
    count = max(experts) + 1
    suffixes = set().union(*(found for projections in experts.values() for found in projections.values()))
    bias = "bias" in suffixes
    encoding = _encoding(files, f"{prefix}experts", suffixes - {"bias"})
    needed = [*(field.suffix for field in encoding.fields), *(["bias"] if bias else [])]
    names = []
    for expert in range(count):
        for projection in PROJECTIONS[naming]:
            found = experts.get(expert, {}).get(projection, set())
            for suffix in needed:
                if suffix not in found:
                    raise ValueError(f"{prefix}experts.{expert}.{projection}.{suffix} is missing in {files.path}")
            names += [f"{prefix}experts.{expert}.{projection}.{suffix}" for suffix in sorted(found)]
    return MoeLayer(prefix, count, naming, encoding, tuple(names), bias)


def _encoding(files: TensorFiles, what: str, suffixes: set[str]) -> Encoding:
    for encoding in ENCODINGS:
        if suffixes - set(encoding.passed_over) == encoding.suffixes():
            return encoding
    for encoding in ENCODINGS:  # one that lacks a tensor is a better guess than none
        if suffixes and suffixes < encoding.suffixes() and suffixes != {"weight"}:
            return encoding
    known = "; ".join(f"{e.name}: {', '.join(sorted(e.suffixes()))}" for e in ENCODINGS)
    raise ValueError(
        f"{what} in {files.path} have the tensors {', '.join(sorted(suffixes))}, which is none of the known formats "
        f"({known})"
    )


def _stacked_layer(files: TensorFiles, prefix: str, suffixes: set[str]) -> MoeLayer:
    layout = GptOss()
    for suffix in layout.needed(bias=any(s.endswith("_bias") for s in suffixes)):
        if suffix not in suffixes:
            raise ValueError(f"{prefix}experts.{suffix} is missing in {files.path}")
    names = tuple(f"{prefix}experts.{suffix}" for suffix in sorted(suffixes))
    info = files.info(f"{prefix}experts.down_proj_blocks")
    count = info.shape[0] if info.shape else 0
    return MoeLayer(prefix, count, "proj", layout, names, any(s.endswith("_bias") for s in suffixes))


def format_named(name: str) -> Encoding | GptOss:
    """The format; ValueError unless ``name`` is one of ``FORMATS``."""
    if name == GPT_OSS:
        return GptOss()
    for encoding in ENCODINGS:
        if encoding.name == name:
            return encoding
    raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {name!r}")


def converted(expert: Expert, form: Form, *, mxfp4_scales: ScaleChoice = "ceil") -> Expert:
    """``expert`` with its matrices in another form, exactly where that is possible."""
    gate, up, down = expert.matrices
    if form == "nvfp4":
        gate, up = to_nvfp4([gate, up])
        (down,) = to_nvfp4([down])
    else:
        gate, up, down = (to_recipe(m, form, mxfp4_scales=mxfp4_scales) for m in expert.matrices)
    return Expert((gate, up, down), expert.biases)


def tensors_of(
    prefix: str, experts: list[Expert], target: Encoding | GptOss, naming: Naming, first: int = 0
) -> dict[str, torch.Tensor]:
    """Name -> tensor of ``experts`` ``first``, ``first`` + 1, ..., whose matrices are in ``target.form``."""
    if isinstance(target, GptOss):
        return target.pack(prefix, [(e.matrices, e.biases) for e in experts])
    tensors: dict[str, torch.Tensor] = {}
    for number, expert in enumerate(experts, first):
        biases = expert.biases or (None, None, None)
        for projection, matrix, bias in zip(PROJECTIONS[naming], expert.matrices, biases, strict=True):
            stem = f"{prefix}experts.{number}.{projection}."
            tensors |= target.write(matrix, stem)
            if bias is not None:
                tensors[f"{stem}bias"] = bias
    return tensors
