"""``MegaRunner``: one rank's workspace and the launches on it."""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist

from megamoe import env
from megamoe.activation import Activation
from megamoe.errors import MegaMoEError
from megamoe.kernels.jit.kernel import LaunchShape, load
from megamoe.kernels.jit.tensor_map import Swizzle, encode
from megamoe.mega.config import BLOCK_ROWS, HALF_COLS, THREADS, Args, MegaConfig
from megamoe.mega.record import Records
from megamoe.mega.workspace import Workspace
from megamoe.prepared import PreparedWeights
from megamoe.problem import Problem
from megamoe.symm_mem import agree
from megamoe.symm_mem.buffer import SymmBuffer

_LAG_ROUNDS = 2  # tiles of the first GEMM that every CTA takes between an expert's and the second GEMM's
_FEW_ROWS = 16  # rows that a block of few is read in (mega/load.cuh)
_MAX_RESULT_SLOTS = 1 << 24  # a slot and its rank share a word


def why_not(problem: Problem, slots: int) -> str | None:
    """None if the kernel can do ``problem`` (somewhere), else a sentence that says why not."""
    if problem.recipe not in ("bf16", "fp8_block"):
        return f"the mega-kernel runs the recipes bf16 and fp8_block in this version, not {problem.recipe}"
    if problem.accumulate != "fp32":
        return f'the mega-kernel accumulates in fp32 in this version, not "{problem.accumulate}"'
    if not problem.activation.gated:
        return f"the mega-kernel runs gated activations in this version, not {problem.activation.name}"
    if problem.world_size > 64:
        return f"the mega-kernel runs up to 64 ranks of one NVLink domain, not {problem.world_size}"
    if problem.max_tokens * problem.top_k >= _MAX_RESULT_SLOTS:
        return f"max_tokens * top_k must be under {_MAX_RESULT_SLOTS}, got {problem.max_tokens * problem.top_k}"
    if slots > 1024:
        return f"a rank may hold 1024 experts, not {slots}"
    return None


def config_for(problem: Problem, slots: int, *, index_64: bool) -> MegaConfig:
    """The kernel for ``problem``; ``why_not`` has said None."""
    assert problem.recipe in ("bf16", "fp8_block")
    return MegaConfig(
        recipe=problem.recipe,
        top_k=problem.top_k,
        activation=problem.activation.name,
        bias=problem.bias,
        weights_before=problem.weights_applied == "before_down",
        index_64=index_64,
        max_slots=_round_up(slots, 32),
        max_offsets=_round_up(problem.world_size * (slots + 1), 32),
        max_kb=_round_up(-(-max(problem.hidden, problem.intermediate) // 128), 32),
    )


def workspace_for(problem: Problem, slots: int) -> Workspace:
    """What a rank with ``slots`` local experts needs in memory; the same for both types of indices."""
    return Workspace(problem=problem, config=config_for(problem, slots, index_64=True), slots=slots)


class MegaRunner:
    """Launches of the mega-kernel by one rank. Made by ``create`` (a rank of a group) or ``virtual`` (in one process).

    One launch at a time: calls on other streams are ordered behind one another by the caller. A call whose waits
    expire fills y with NaN, and the next call, or ``check()``, raises PeerTimeout; then ``reset()`` on every rank.
    """

    def __init__(self, problem: Problem, slots: int, buffer: SymmBuffer, *, num_sms: int | None = None) -> None:
        self.problem, self.slots, self.buffer = problem, slots, buffer
        self.workspace = workspace_for(problem, slots)
        assert buffer.arena == self.workspace.arena
        self.records = Records(buffer.device)
        self.broken: MegaMoEError | None = None
        self._group: dist.ProcessGroup | None = None
        available = torch.cuda.get_device_properties(buffer.device).multi_processor_count
        self.num_sms = num_sms or available
        if not 1 <= self.num_sms <= available:
            raise ValueError(f"num_sms must be 1 to {available}, the multiprocessors of this GPU, got {num_sms}")
        routes = -(-problem.max_tokens // self.num_sms) * problem.top_k  # of a CTA's slice; ranked in 16 bits
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
        backend: str = "auto",
        num_sms: int | None = None,
    ) -> MegaRunner:
        """Collective over ``group``: allocate the workspace.

        Raises, on every rank:
            ValueError: a problem that the kernel can't do, with the reason; what ``SymmBuffer.create`` raises.
        """
        slots = _slots(problem, slots)
        arena = workspace_for(problem, slots).arena
        buffer = SymmBuffer.create(arena, device=device, group=group, backend=backend)
        runner = cls(problem, slots, buffer, num_sms=num_sms)
        runner._group = group
        return runner

    @classmethod
    def virtual(
        cls, problem: Problem, *, device: torch.device | str, slots: int | None = None, num_sms: int | None = None
    ) -> list[MegaRunner]:
        """R = ``problem.world_size`` ranks on one GPU, each on its share of the multiprocessors; launch each on a
        stream of its own, all of them before waiting for any."""
        device = torch.device(device)
        slots = _slots(problem, slots)
        arena = workspace_for(problem, slots).arena
        share = torch.cuda.get_device_properties(device).multi_processor_count // problem.world_size
        buffers = SymmBuffer.virtual(arena, problem.world_size, device=device)
        return [cls(problem, slots, buffer, num_sms=num_sms or share) for buffer in buffers]

    def with_activation(self, activation: Activation) -> MegaRunner:
        """A runner of the same problem but for the activation, on this workspace: their calls are one sequence."""
        problem = dataclasses.replace(self.problem, activation=activation)
        other = MegaRunner(problem, self.slots, self.buffer, num_sms=self.num_sms)
        other._group, other.records = self._group, self.records
        other._args = other._fixed_arguments()
        return other

    def forward(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        weights: PreparedWeights,
        *,
        x_scale: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        num_tokens: torch.Tensor | None = None,
        trace: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Queue one call on the current stream; never waits for the device.

        Args:
            x: [T, H] bf16 with unit inner stride, T at most ``problem.max_tokens``; e4m3 if ``x_scale`` is given.
            topk_idx: [T, K] int64 or int32, slots over all ranks (expert ids under contiguous placement), -1 = none.
            topk_weights: [T, K] fp32.
            weights: this rank's experts in the problem's recipe.
            x_scale: fp32 [T, ceil(H / 128)] with unit inner stride, recipe fp8_block: x is cast already, and crosses as
                it is. H is a multiple of 16.
            out: [T, H] bf16 to write y to; must not overlap x.
            num_tokens: int32 on the device, the tokens that count this time; rows of y beyond stay untouched. None
            means T.
            trace: int64 [num_sms, 20] on the device: when each CTA did what, in ns, and what it spent cycles on
                (``mega/context.cuh``: Moment, Spent).

        Raises:
            ValueError: an argument that does not fit, with got and expected.
            PeerTimeout: an earlier call's wait expired.
        """
        self.check()
        T = self._check_call(x, x_scale, topk_idx, topk_weights, weights)
        y = torch.empty(T, self.problem.hidden, dtype=torch.bfloat16, device=x.device) if out is None else out
        if y.shape != x.shape or y.dtype != torch.bfloat16 or y.device != x.device or (T and y.stride(1) != 1):
            raise ValueError(f"out must be bf16 {tuple(x.shape)} on {x.device}, got {y.dtype} {tuple(y.shape)}")
        args = self._args
        args.x, args.topk_idx, args.topk_weights = x.data_ptr(), topk_idx.data_ptr(), topk_weights.data_ptr()
        args.y, args.x_ld, args.y_ld, args.num_tokens = y.data_ptr(), x.stride(0), y.stride(0), T
        args.x_scales, args.x_scales_ld = (0, 0) if x_scale is None else (x_scale.data_ptr(), x_scale.stride(0))
        args.device_tokens = 0 if num_tokens is None else num_tokens.data_ptr()
        args.trace = 0 if trace is None else trace.data_ptr()
        self._set_weights(weights)
        args.limit_ns = int(env.get("MEGAMOE_TIMEOUT_S") * 1e9)
        config = config_for(self.problem, self.slots, index_64=topk_idx.dtype == torch.int64)
        config = dataclasses.replace(config, trace=trace is not None, x_scaled=x_scale is not None)
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
        for name in ("abort", "header_flags", "done_flags", "arrived", "control", "histogram", "sent"):
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
            "results", "control", "histogram", "sent", "tiles_done", "copied", "pushes", "pool",
            "pool_scales", "mid", "mid_scales",
        ):  # fmt: skip
            setattr(args, name, arena.offsets[name])
        args.record, args.ring_record = self.records.record, self.records.ring_record
        args.max_tokens, args.rank, args.world, args.slots = p.max_tokens, self.buffer.rank, p.world_size, self.slots
        args.max_copies, args.hidden, args.intermediate = w.max_copies, p.hidden, p.intermediate
        args.row_pitch, args.scale_pitch = w.row_pitch, w.scale_pitch
        args.max_blocks, args.mid_rows = w.max_blocks, w.max_blocks * BLOCK_ROWS
        args.up_kb, args.down_kb, args.up_tiles, args.down_tiles = w.up_kb, w.down_kb, w.up_tiles, w.down_tiles
        args.lag = _LAG_ROUNDS * self.num_sms
        args.act_limit, args.act_alpha = p.activation.limit, p.activation.alpha
        args.mid_pitch, args.ring_blocks = w.mid_columns * w.config.element_bytes, w.ring_blocks
        dtype, size = arena.fields["mid"].dtype, w.config.element_bytes
        pool = (w.ring_blocks * BLOCK_ROWS, w.row_pitch // size, w.row_pitch // size)
        for name, (rows, columns, pitch) in (("pool", pool), ("mid", (args.mid_rows, p.intermediate, w.mid_columns))):
            for suffix, box in (("", BLOCK_ROWS), ("_few", _FEW_ROWS)):
                made = encode(
                    base + arena.offsets[name],
                    dtype=dtype,
                    shape=(rows, columns),
                    strides=(pitch, 1),
                    box=(box, w.config.block_k),
                )
                setattr(args, f"map_{name}{suffix}", made)
            if w.config.block_scaled:
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
                box=(HALF_COLS, self.workspace.config.block_k),
            )
            setattr(args, f"map_{name}", made)
        for field, optional in (
            ("scales_w13", weights.w13_scale),
            ("scales_w2", weights.w2_scale),
            ("bias13", weights.b13),
            ("bias2", weights.b2),
        ):
            setattr(args, field, 0 if optional is None else optional.data_ptr())

    def _check_call(
        self,
        x: torch.Tensor,
        x_scale: torch.Tensor | None,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        weights: PreparedWeights,
    ) -> int:
        p, device = self.problem, self.buffer.device
        T, K = x.shape[0] if x.dim() else 0, p.top_k
        dtype, name = (torch.bfloat16, "bf16") if x_scale is None else (torch.float8_e4m3fn, "e4m3")
        if x.dim() != 2 or x.shape[1] != p.hidden or x.dtype != dtype or (T and x.stride(1) != 1):
            raise ValueError(
                f"x must be {name} [tokens, {p.hidden}] with unit inner stride, got {x.dtype} {tuple(x.shape)} "
                f"with strides {x.stride()}"
            )
        if x_scale is not None:
            check_x_scale(x_scale, T, p)
        if x.data_ptr() % 16 or (T > 1 and x.stride(0) * x.element_size() % 16):
            raise ValueError(f"rows of x must start on 16 bytes, got address {x.data_ptr():#x}, strides {x.stride()}")
        if p.max_tokens < T:
            raise ValueError(f"x has {T} tokens, but problem.max_tokens is {p.max_tokens}")
        if tuple(topk_idx.shape) != (T, K) or topk_idx.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"topk_idx must be {(T, K)} int64 or int32, got {tuple(topk_idx.shape)} {topk_idx.dtype}")
        if tuple(topk_weights.shape) != (T, K) or topk_weights.dtype != torch.float32:
            raise ValueError(
                f"topk_weights must be {(T, K)} fp32, got {tuple(topk_weights.shape)} {topk_weights.dtype}"
            )
        if not (topk_idx.is_contiguous() and topk_weights.is_contiguous()):
            raise ValueError(f"topk_idx and topk_weights must be contiguous, got strides {topk_idx.stride()}")
        for name, tensor in (
            ("x", x),
            ("x_scale", x_scale),
            ("topk_idx", topk_idx),
            ("topk_weights", topk_weights),
            ("w13", weights.w13),
        ):
            if tensor is not None and tensor.device != device:
                raise ValueError(f"{name} must be on {device} like the workspace, got {tensor.device}")
        weights.check(p, self.slots)
        return T


def check_x_scale(x_scale: torch.Tensor, num_tokens: int, problem: Problem) -> None:
    """Raise ValueError with got and expected if scales that come with x do not fit."""
    if problem.recipe != "fp8_block" or problem.hidden % 16:
        raise ValueError(
            f"x_scale goes with the recipe fp8_block and rows of whole 16 bytes, got {problem.recipe} and hidden "
            f"{problem.hidden}"
        )
    shape = (num_tokens, -(-problem.hidden // 128))
    if tuple(x_scale.shape) != shape or x_scale.dtype != torch.float32 or (num_tokens and x_scale.stride(1) != 1):
        raise ValueError(
            f"x_scale must be fp32 {shape} with unit inner stride, got {x_scale.dtype} {tuple(x_scale.shape)} "
            f"with strides {x_scale.stride()}"
        )


def _slots(problem: Problem, slots: int | None) -> int:
    slots = slots or -(-problem.num_experts // problem.world_size)
    if (reason := why_not(problem, slots)) is not None:
        raise ValueError(reason)
    return slots


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
