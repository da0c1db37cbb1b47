"""Routers: which experts a token visits, with what weights, and the losses that keep the experts evenly loaded."""

from megamoe.router.config import PRESETS, RouterConfig
from megamoe.router.module import Router

__all__ = ["PRESETS", "Router", "RouterConfig"]
