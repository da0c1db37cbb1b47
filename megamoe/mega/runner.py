"""``MegaRunner``: one rank's workspace and the launches on it."""

from __future__ import annotations

import dataclasses
from typing import cast, get_args

import torch
import torch.distributed as dist

from megamoe import env
from megamoe.activation import Activation
from megamoe.errors import MegaMoEError
from megamoe.kernels.jit.kernel import LaunchShape, load
from megamoe.kernels.jit.tensor_map import Swizzle, encode
from megamoe.mega.checks import check_call
from megamoe.mega.config import BLOCK_ROWS, GROUP_COLS, MAX_ROUTES, THREADS, Args, MegaConfig, MegaRecipe
from megamoe.mega.partial_sums import chosen
from megamoe.mega.record import Records
from megamoe.mega.tokens import QuantisedTokens
from megamoe.mega.trace import room
from megamoe.mega.workspace import Workspace
from megamoe.prepared import PreparedWeights
from megamoe.problem import Problem
from megamoe.symm_mem import agree
from megamoe.symm_mem.buffer import SymmBuffer

_LAG_ROUNDS = 2  # tiles of the first GEMM that every CTA takes between an expert's and the second GEMM's
_UPS_FIRST_FROM = 1536  # intermediate size from which all of them come first: the link keeps up with results
_FEW_ROWS = 16  # rows that a block of few is read in (mega/load.cuh)
_MAX_RESULT_SLOTS = 1 << 31  # numbered in 31 bits


def why_not(problem: Problem, slots: int, num_shared: int = 0) -> str | None:
    """None if the kernel can do ``problem`` (somewhere), else a sentence that says why not.

    ``slots``: experts of a rank among those that are routed to; ``num_shared``: others that each of its tokens visits.
    """
    if problem.recipe not in get_args(MegaRecipe):
        known = ", ".join(get_args(MegaRecipe))
        return f"the mega-kernel runs the recipes {known} in this version, not {problem.recipe}"
    if problem.world_size > 64:
        return f"the mega-kernel runs up to 64 ranks of one NVLink domain, not {problem.world_size}"
    routes = problem.top_k + num_shared
    if num_shared < 0 or routes > MAX_ROUTES:
        return f"a token may visit {MAX_ROUTES} experts, shared ones included, not {problem.top_k} + {num_shared}"
    if problem.max_tokens * routes >= _MAX_RESULT_SLOTS:
        return f"max_tokens * top_k must be under {_MAX_RESULT_SLOTS}, got {problem.max_tokens * routes}"
    if slots + num_shared > 1024:
        return f"a rank may hold 1024 experts, not {slots + num_shared}"
    return None


def config_for(
    problem: Problem, slots: int, *, index_64: bool, num_shared: int = 0, partial_sums: bool | None = None
) -> MegaConfig:
    """The kernel for ``problem``; ``why_not`` has said None. ``partial_sums``: see ``MegaRunner``."""
    slots += num_shared
    return MegaConfig(
        recipe=cast(MegaRecipe, problem.recipe),
        accumulate="fp32" if problem.recipe == "bf16" else problem.accumulate,
        top_k=problem.top_k,
        activation=problem.activation.name,
        bias=problem.bias,
        weights_before=problem.weights_applied == "before_down",
        index_64=index_64,
        num_shared=num_shared,
        max_slots=_round_up(slots, 32),
        max_offsets=_round_up(problem.world_size * (slots + 1), 32),
        max_kb=_round_up(-(-max(problem.hidden, problem.intermediate) // 128), 32),
        partial_sums=chosen(problem, partial_sums),
    )


def workspace_for(problem: Problem, slots: int, num_shared: int = 0, *, partial_sums: bool | None = None) -> Workspace:
    """What a rank with ``slots`` local experts needs in memory; the same for both types of indices."""
    config = config_for(problem, slots, index_64=True, num_shared=num_shared, partial_sums=partial_sums)
    return Workspace(problem=problem, config=config, slots=slots + num_shared)


class MegaRunner:
    """Launches of the mega-kernel by one rank. Made by ``create`` (a rank of a group) or ``virtual`` (in one process).

    With ``num_shared`` = n each token also visits n shared experts of width I, replicated on every rank, with weight 1:
    the first n of the weights that ``forward`` takes (``SharedExperts.as_experts``). Their rows cross no link.

    With ``partial_sums`` owners keep the rows of a token, add them up and send one row back, in place of one for each
    route; y is the same to the bit, and the workspace grows by ``returns``. None: as MEGAMOE_PARTIAL_SUMS says, or
    ``megamoe.mega.partial_sums`` thinks best. The same on every rank.

    One launch at a time: calls on other streams are ordered behind one another by the caller. A call whose waits
    expire fills y with NaN, and the next call, or ``check()``, raises PeerTimeout; then ``reset()`` on every rank.
    """

    def __init__(
        self,
        problem: Problem,
        slots: int,
        buffer: SymmBuffer,
        *,
        num_shared: int = 0,
        num_sms: int | None = None,
        partial_sums: bool | None = None,
    ) -> None:
        self.problem, self.slots, self.buffer, self.num_shared = problem, slots, buffer, num_shared
        self.workspace = workspace_for(problem, slots, num_shared, partial_sums=partial_sums)
        assert buffer.arena == self.workspace.arena
        self.records = Records(buffer.device)
        self.broken: MegaMoEError | None = None
        self._group: dist.ProcessGroup | None = None
        available = torch.cuda.get_device_properties(buffer.device).multi_processor_count
        self.num_sms = num_sms or available
        if not 1 <= self.num_sms <= available:
            raise ValueError(f"num_sms must be 1 to {available}, the multiprocessors of this GPU, got {num_sms}")
        # Of a CTA's slice; ranked in 16 bits.
        routes = -(-problem.max_tokens // self.num_sms) * self.workspace.config.routes
        sort = 4 * (5 * (self.workspace.total_slots + 1) + routes)
        most = self.workspace.config.sort_bytes
        if sort > most or routes >= 1 << 16:
            raise ValueError(
                f"sorting {problem.max_tokens} tokens on {self.num_sms} multiprocessors takes {sort} bytes of shared "
                f"memory each, {most} are there: lower max_tokens or give more multiprocessors"
            )
        self._args = self._fixed_arguments()

    @classmethod
    def create(
        cls,
        problem: Problem,
        *,
        device: torch.device | str,
        group: dist.ProcessGroup | None = None,
        slots: int | None = None,
        num_shared: int = 0,
        backend: str = "auto",
        num_sms: int | None = None,
        partial_sums: bool | None = None,
    ) -> MegaRunner:
        """Collective over ``group``: allocate the workspace.

        Raises, on every rank:
            ValueError: a problem that the kernel can't do, with the reason; what ``SymmBuffer.create`` raises.
        """
        slots = _slots(problem, slots, num_shared)
        arena = workspace_for(problem, slots, num_shared, partial_sums=partial_sums).arena
        buffer = SymmBuffer.create(arena, device=device, group=group, backend=backend)
        runner = cls(problem, slots, buffer, num_shared=num_shared, num_sms=num_sms, partial_sums=partial_sums)
        runner._group = group
        return runner

    @classmethod
    def virtual(
        cls,
        problem: Problem,
        *,
        device: torch.device | str,
        slots: int | None = None,
        num_shared: int = 0,
        num_sms: int | None = None,
        partial_sums: bool | None = None,
    ) -> list[MegaRunner]:
        """R = ``problem.world_size`` ranks on one GPU, each on its share of the multiprocessors; launch each on a
        stream of its own, all of them before waiting for any."""
        device = torch.device(device)
        slots = _slots(problem, slots, num_shared)
        arena = workspace_for(problem, slots, num_shared, partial_sums=partial_sums).arena
        share = torch.cuda.get_device_properties(device).multi_processor_count // problem.world_size
        buffers = SymmBuffer.virtual(arena, problem.world_size, device=device)
        sms = num_sms or share
        return [cls(problem, slots, b, num_shared=num_shared, num_sms=sms, partial_sums=partial_sums) for b in buffers]

    def with_activation(self, activation: Activation) -> MegaRunner:
        """A runner of the same problem but for the activation, on this workspace: their calls are one sequence."""
        problem, config = dataclasses.replace(self.problem, activation=activation), self.workspace.config
        other = MegaRunner(
            problem,
            self.slots,
            self.buffer,
            num_sms=self.num_sms,
            num_shared=config.num_shared,
            partial_sums=config.partial_sums,
        )
        other._group, other.records = self._group, self.records
        other._args = other._fixed_arguments()
        return other

    def forward(
        self,
        x: torch.Tensor | QuantisedTokens,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        weights: PreparedWeights,
        *,
        out: torch.Tensor | None = None,
        num_tokens: torch.Tensor | None = None,
        trace: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Queue one call on the current stream; never waits for the device.

        Args:
            x: [T, H] bf16 with unit inner stride, T at most ``problem.max_tokens``; for fp8 recipes also
                ``QuantisedTokens``, which are sent as they are.
            topk_idx: [T, K] int64 or int32, slots over all ranks (expert ids under contiguous placement), -1 = none.
            topk_weights: [T, K] fp32.
            weights: this rank's experts in the problem's recipe, shared ones first.
            out: [T, H] bf16 to write y to; must not overlap x.
            num_tokens: int32 on the device, the tokens that count this time; rows of y beyond stay untouched. None
            means T.
            trace: int64 on the device, from ``megamoe.mega.trace.empty``: takes down what each CTA did when, for
                ``megamoe.mega.trace.decode``; what it held is overwritten. Another kernel is launched, a little slower.

        Raises:
            ValueError: an argument that does not fit, with got and expected.
            PeerTimeout: an earlier call's wait expired.
        """
        self.check()
        values, scales = (x.values, x.scales) if isinstance(x, QuantisedTokens) else (x, None)
        p, device = self.problem, self.buffer.device
        T = check_call(x, topk_idx, topk_weights, weights, problem=p, slots=self.workspace.slots, device=device)
        y = torch.empty(T, p.hidden, dtype=torch.bfloat16, device=device) if out is None else out
        if y.shape != values.shape or y.dtype != torch.bfloat16 or y.device != device or (T and y.stride(1) != 1):
            raise ValueError(f"out must be bf16 {tuple(values.shape)} on {device}, got {y.dtype} {tuple(y.shape)}")
        args = self._args
        args.x_scales = 0 if scales is None else scales.data_ptr()
        args.x_scales_ld, args.x_scales_step = (0, 0) if scales is None else scales.stride()
        args.x, args.topk_idx, args.topk_weights = values.data_ptr(), topk_idx.data_ptr(), topk_weights.data_ptr()
        args.y, args.x_ld, args.y_ld, args.num_tokens = y.data_ptr(), values.stride(0), y.stride(0), T
        args.device_tokens = 0 if num_tokens is None else num_tokens.data_ptr()
        args.trace, args.trace_events = 0, 0
        if trace is not None:
            args.trace_events = room(trace, self.num_sms, self.buffer.device)
            args.trace = trace.zero_().data_ptr()
        self._set_weights(weights)
        args.limit_ns = int(env.get("MEGAMOE_TIMEOUT_S") * 1e9)
        config = dataclasses.replace(
            self.workspace.config,
            index_64=topk_idx.dtype == torch.int64,
            quantised=scales is not None,
            trace=trace is not None,
        )
        shape = LaunchShape(threads=THREADS, smem_bytes=config.smem_bytes, cooperative=True)
        load(config.source(), shape).launch(args, self.num_sms)
        return y

    def check(self) -> None:
        """Raise what an earlier call reported, if anything. Does not wait: synchronise first to be sure of the last."""
        self.broken = self.broken or self.records.error()
        if self.broken is not None:
            raise self.broken

    def bad_index_seen(self) -> bool:
        """Whether any call so far met an index outside of [-1, E); waits for the device."""
        return bool(self.buffer["control"][6].item())

    def reset(self) -> None:
        """Collective: make a broken workspace usable again. Every rank must call it; PeerTimeout if one does not."""
        torch.cuda.synchronize(self.buffer.device)
        agree.barrier(self._group, "a workspace to be reset")
        for name in (
            "abort", "header_flags", "done_flags", "arrived", "control", "histogram", "sent", "tiles_done", "copied",
            "casts_done",
        ):  # fmt: skip
            self.buffer[name].zero_()
        torch.cuda.synchronize(self.buffer.device)
        self.records.clear()
        self.broken = None
        agree.barrier(self._group, "a reset workspace")

    def close(self) -> None:
        """Give the workspace's memory back."""
        self.buffer.close()

    def _fixed_arguments(self) -> Args:
        w, p, arena = self.workspace, self.problem, self.buffer.arena
        args = Args()
        args.bases = self.buffer.pointers_device.data_ptr()
        base = args.own = self.buffer.pointers[self.buffer.rank]
        for name in (
            "abort", "header_flags", "done_flags", "offsets", "targets", "arrived", "routes", "rows", "row_scales",
            "results", "control", "histogram", "sent", "tiles_done", "copied", "casts_done", "pushes", "pool",
            "pool_scales", "mid", "mid_scales", "returns",
        ):  # fmt: skip
            setattr(args, name, arena.offsets[name])
        args.record, args.ring_record = self.records.record, self.records.ring_record
        args.max_tokens, args.rank, args.world, args.slots = p.max_tokens, self.buffer.rank, p.world_size, w.slots
        args.max_copies, args.hidden, args.intermediate = w.max_copies, p.hidden, p.intermediate
        args.row_pitch, args.scale_pitch = w.row_pitch, w.scale_pitch
        args.max_blocks, args.mid_rows = w.max_blocks, w.max_blocks * BLOCK_ROWS
        args.up_kb, args.down_kb, args.up_tiles, args.down_tiles = w.up_kb, w.down_kb, w.up_tiles, w.down_tiles
        args.lag, args.ups_first = _LAG_ROUNDS * self.num_sms, p.intermediate >= _UPS_FIRST_FROM
        args.act_limit, args.act_alpha = p.activation.limit, p.activation.alpha
        args.mid_pitch, args.ring_blocks = w.mid_columns * w.config.mid_dtype.itemsize, w.ring_blocks
        dtype, size = w.config.operand, w.config.element_bytes
        pool = (w.ring_blocks * BLOCK_ROWS, w.row_pitch // size, w.row_pitch // size)
        mid = (args.mid_rows, p.intermediate, args.mid_pitch // size)
        for name, (rows, columns, pitch) in (("pool", pool), ("mid", mid)):
            for suffix, box in (("", BLOCK_ROWS), ("_few", _FEW_ROWS)):
                made = encode(
                    base + arena.offsets[name],
                    dtype=dtype,
                    shape=(rows, columns),
                    strides=(pitch, 1),
                    box=(box, w.config.block_k),
                )
                setattr(args, f"map_{name}{suffix}", made)
            if w.row_scales:
                made = encode(
                    base + arena.offsets[f"{name}_scales"],
                    dtype=torch.float32,
                    shape=(arena.fields[f"{name}_scales"].shape[0], rows),
                    strides=(rows, 1),
                    box=(1, BLOCK_ROWS),
                    swizzle=Swizzle.NONE,
                )
                setattr(args, f"map_{name}_scales", made)
        return args

    def _set_weights(self, weights: PreparedWeights) -> None:
        args = self._args
        for name in ("w13", "w2"):
            tensor: torch.Tensor = getattr(weights, name)
            slots, rows, columns = tensor.shape
            assert tensor.stride(0) == rows * tensor.stride(1) and tensor.stride(2) == 1, tensor.stride()
            made = encode(
                tensor.data_ptr(),
                dtype=tensor.dtype,
                shape=(slots * rows, columns),
                strides=(tensor.stride(1), 1),
                box=(GROUP_COLS, self.workspace.config.block_k),
            )
            setattr(args, f"map_{name}", made)
        for field, optional in (
            ("scales_w13", weights.w13_scale),
            ("scales_w2", weights.w2_scale),
            ("bias13", weights.b13),
            ("bias2", weights.b2),
        ):
            assert optional is None or (optional.is_contiguous() and optional.data_ptr() % 8 == 0), field
            setattr(args, field, 0 if optional is None else optional.data_ptr())


def _slots(problem: Problem, slots: int | None, num_shared: int) -> int:
    slots = slots or -(-problem.num_experts // problem.world_size)
    if (reason := why_not(problem, slots, num_shared)) is not None:
        raise ValueError(reason)
    return slots


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
