"""Layers for the mega-kernel's tests: forms of the kernel, ranks of one process, and what every y is held against."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from megamoe.mega.runner import MegaRunner, config_for
from megamoe.mega.tokens import QuantisedTokens
from megamoe.prepared import PreparedWeights
from megamoe.testing.mega_activations import check_activations, check_fast, kernel_activations
from megamoe.testing.mega_twin import BOUNDS, Expert, layer
from megamoe.testing.numerics import assert_close
from megamoe.weights import ExpertWeights
from tests.engines.cases import Case

RECIPES = ("bf16", "fp8_block", "fp8_row")
# Each is a kernel to compile for each recipe; all other sizes are arguments of a launch.
FORMS: dict[str, dict[str, Any]] = {
    "k4": {"top_k": 4},
    "k4 fast": {"top_k": 4, "accumulate": "fast"},
    "k4 int32": {"top_k": 4, "index_64": False},
    "k1": {"top_k": 1},
    "k16": {"top_k": 16},
    "k6 clamped bias": {"top_k": 6, "activation": "swiglu_clamped", "bias": True},
    "k2 geglu before bias": {"top_k": 2, "activation": "geglu", "weights_applied": "before_down", "bias": True},
    "k8 before": {"top_k": 8, "weights_applied": "before_down"},
    "k3 geglu bias": {"top_k": 3, "activation": "geglu", "bias": True},
    "k5 relu2": {"top_k": 5, "activation": "relu2"},
    "k2 relu2 before bias": {"top_k": 2, "activation": "relu2", "weights_applied": "before_down", "bias": True},
}
ROW_FORMS = ("k4", "k4 fast", "k16", "k6 clamped bias", "k2 relu2 before bias")
CHOICES = [
    (r, f) for r in RECIPES for f in (ROW_FORMS if r == "fp8_row" else FORMS) if (r, f) != ("fp8_block", "k4 int32")
]
"""Recipes with the forms that they are tested in."""
PARTIAL = ("k4", "k4 fast", "k1", "k16", "k8 before", "k6 clamped bias", "k2 relu2 before bias")
PARTIAL_FORMS = [(recipe, form) for recipe, form in CHOICES if form in PARTIAL]
"""Those that owners add up rows in, too."""
MANY_SLOTS = 96
BASE = Case(experts=16, top_k=4, hidden=264, intermediate=200, tokens=(150, 60, 0, 77, 1, 128, 129, 30), device="cuda")


def case_of(form: str, recipe: str, **more: Any) -> tuple[Case, torch.dtype]:
    """(case, dtype of topk_idx) of one form."""
    fields = dict(FORMS[form])
    dtype = torch.int64 if fields.pop("index_64", True) else torch.int32
    return replace(BASE, recipe=recipe, **{**fields, **more}), dtype


@dataclass(frozen=True)
class Given:
    """One rank's arguments."""

    x: Any  # a tensor, or QuantisedTokens
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor

    def first(self, tokens: int) -> Given:
        return Given(self.x[:tokens], self.topk_idx[:tokens], self.topk_weights[:tokens])


class Layer:
    """A case on R ranks: weights of all of them, prepared and as the GEMMs see them."""

    def __init__(
        self, case: Case, world_size: int, *, index: torch.dtype = torch.int64, shared: ExpertWeights | None = None
    ) -> None:
        self.case, self.world_size, self.index = case, world_size, index
        self.problem = case.problem(world_size)
        self.num_shared = 0 if shared is None else len(shared.w13)
        self.slots = case.experts // world_size + self.num_shared
        own = [case.local_weights(r, world_size) for r in range(world_size)]
        if shared is not None:
            own = [ExpertWeights.cat(shared, w) for w in own]
        self.weights = [PreparedWeights.from_float(w, self.problem) for w in own]
        self._dense = [w.dequantise() for w in self.weights]

    @property
    def experts_of_a_rank(self) -> dict[str, int]:
        """As ``MegaRunner`` takes them."""
        return {"slots": self.slots - self.num_shared, "num_shared": self.num_shared}

    def expert(self, p: int) -> Expert:
        rank, slot = divmod(p, self.slots)
        w = self._dense[rank]
        biases = (None if w.b13 is None else w.b13[slot], None if w.b2 is None else w.b2[slot])
        return Expert(w.w13[slot], w.w2[slot], *biases)

    def given(self, rank: int, *, seed: int = 0, **changes: Any) -> Given:
        """Fresh inputs of one rank."""
        case = replace(self.case, seed=self.case.seed + 100 * seed, **changes)
        x, idx, weights, _ = case.inputs(rank, self.world_size)
        device = self.case.device
        return Given(x.to(device), idx.to(device, self.index), weights.to(device))

    def all_given(self, **changes: Any) -> list[Given]:
        return [self.given(rank, **changes) for rank in range(self.world_size)]

    def check(self, runner: MegaRunner, given: Given, y: torch.Tensor, what: str = "") -> None:
        """y of the runner's last call; every rank's call is complete and none has started another.

        Raises:
            AssertionError: y, or an activation in e4m3, is wrong.
        """
        rank = runner.buffer.rank
        ones = given.topk_weights.new_ones(len(given.topk_weights), self.num_shared)
        topk_weights = torch.cat([given.topk_weights, ones], dim=1)
        what = f"{what} rank {rank} of {self.world_size}, {self.case.recipe}"
        slots = runner.workspace.physical(given.topk_idx, rank)
        cut = None
        if self.problem.recipe != "bf16":
            views = [runner.buffer.peer(r) for r in range(self.world_size)]
            tokens = torch.arange(len(slots), device=slots.device)
            cut = kernel_activations(views, runner.workspace, rank, tokens, slots)
        rounded = isinstance(given.x, QuantisedTokens)
        twin = layer(
            given.x.dequantise() if rounded else given.x, slots, topk_weights, self.expert,
            problem=self.problem, slots_per_rank=self.slots, mid=None if cut is None else cut.values,
            x_is_rounded=rounded,
        )  # fmt: skip
        whole, row = BOUNDS["fp32" if cut is None else self.case.accumulate]
        if cut is None:
            assert_close(y, twin.y, whole=whole, row=row, what=f"{what}: y")
            return
        assert twin.y_from_mid is not None and twin.slack is not None
        if self.case.accumulate == "fast":
            check_fast(cut, twin.exact, slots)
        else:
            check_activations(cut, twin.exact, slots, twin.slack)
        assert_close(y, twin.y_from_mid, whole=whole, row=row, what=f"{what}: y from the kernel's activations")


class Virtual:
    """All ranks of a layer on this GPU."""

    def __init__(self, layer_: Layer, *, partial_sums: bool | None = None) -> None:
        self.layer = layer_
        self.runners = MegaRunner.virtual(
            layer_.problem, device=layer_.case.device, partial_sums=partial_sums, **layer_.experts_of_a_rank
        )
        self.streams = [torch.cuda.Stream() for _ in self.runners]

    def launch(
        self,
        given: list[Given],
        *,
        ranks: list[int] | None = None,
        outs: list[torch.Tensor] | None = None,
        num_tokens: list[torch.Tensor] | None = None,
        traces: list[torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """Queue a call of each rank, on its stream; outputs are poisoned before. Waits for nothing."""
        outs = outs or [torch.full_like(g.x, torch.nan) for g in given]
        for rank in range(len(self.runners)) if ranks is None else ranks:
            g, stream = given[rank], self.streams[rank]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.runners[rank].forward(
                    g.x, g.topk_idx, g.topk_weights, self.layer.weights[rank],
                    out=outs[rank], num_tokens=None if num_tokens is None else num_tokens[rank],
                    trace=None if traces is None else traces[rank],
                )  # fmt: skip
        return outs

    def call(self, given: list[Given], what: str = "", **options: Any) -> list[torch.Tensor]:
        """A call that is complete and right."""
        ys = self.launch(given, **options)
        self.finish(given, ys, what)
        return ys

    def finish(self, given: list[Given], ys: list[torch.Tensor], what: str = "") -> None:
        """Wait for a call and check it."""
        torch.cuda.synchronize()
        for runner, g, y in zip(self.runners, given, ys, strict=True):
            runner.check()
            self.layer.check(runner, g, y, what)

    def close(self) -> None:
        torch.cuda.synchronize()
        for runner in self.runners:
            runner.close()

    def __enter__(self) -> Virtual:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def sources() -> list[Any]:
    """Every kernel that these tests launch."""
    found = []
    for recipe, form in CHOICES:
        case, index = case_of(form, recipe)
        for world_size in (1, 2, 4, 8):
            for slots in (1, 32 // world_size):
                config = config_for(case.problem(world_size), slots, index_64=index == torch.int64)
                found.append(config.source())
    for recipe, form in PARTIAL_FORMS:
        case, index = case_of(form, recipe)
        for world_size in (1, 2, 4, 8):
            slots, index_64 = case.experts // world_size, index == torch.int64
            for partial_sums in (False, True):
                config = config_for(case.problem(world_size), slots, index_64=index_64, partial_sums=partial_sums)
                found.append(config.source())
    for recipe in RECIPES:
        found.append(config_for(case_of("k4", recipe)[0].problem(1), MANY_SLOTS, index_64=True).source())
    return list(dict.fromkeys(found))


def create(layer_: Layer, rank: int, group: dist.ProcessGroup, *, partial_sums: bool | None = None) -> MegaRunner:
    """One real rank's runner."""
    return MegaRunner.create(
        layer_.problem, device=f"cuda:{rank}", group=group, partial_sums=partial_sums, **layer_.experts_of_a_rank
    )
