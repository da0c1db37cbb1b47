"""Experts of pretrained checkpoints, in the formats people publish, as weights of a recipe or as another checkpoint."""

from megamoe.pretrained.convert import Conversion, convert
from megamoe.pretrained.layers import FORMATS, Expert, MoeLayer
from megamoe.pretrained.load import PretrainedExperts
from megamoe.pretrained.report import ErrorReport, TensorError

__all__ = ["FORMATS", "Conversion", "ErrorReport", "Expert", "MoeLayer", "PretrainedExperts", "TensorError", "convert"]
