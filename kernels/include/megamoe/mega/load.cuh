// The helper warps that fill the ring: one brings weights, which wait for nobody; two bring rows: gathered from where
// the sources pushed them (up), or as blocks of activations that this rank's CTAs have written (down).
#pragma once
#include "megamoe/mega/schedule.cuh"
#include "megamoe/ptx/cp_async.cuh"
#include "megamoe/ptx/tma.cuh"

namespace megamoe::mega {

template <class C>
struct WeightLoader {
    using L = Layout<C>;
    Context<C> x;
    typename Context<C>::Ring ring{x.smem + L::kBarriersAt};

    // By one lane.
    MM_DEVICE void run() {
        Walk<C> walk(x);
        Unit t;
        constexpr i32 kBlockK = kRowBytes / C::Elem::kBytes;
        while (walk.next(t)) {
            const TensorMap* map = t.down ? &x.args.map_w2 : &x.args.map_w13;
            const i32 blocks = t.down ? x.args.down_kb : x.args.up_kb;
            // Up: 128 columns of gate, then the 128 of up that belong to them.
            i32 row[2];
            if (t.down) {
                row[0] = t.expert * x.args.hidden + t.n * kTileCols;
                row[1] = row[0] + kHalfCols;
            } else {
                row[0] = t.expert * 2 * x.args.intermediate + t.n * kHalfCols;
                row[1] = row[0] + x.args.intermediate;
            }
            for (i32 kb = 0; kb < blocks; ++kb) {
                ring.wait_empty(x.ring_limit);
                const u32 full = ring.full(ring.stage), b = x.smem + ring.stage * L::kStage + L::kA;
                if (x.waits.aborted()) {
                    ptx::mbarrier_arrive(full);
                } else {
                    ptx::mbarrier_arrive_expect_tx(full, L::kB);
#pragma unroll
                    for (int half = 0; half < 2; ++half)
                        ptx::tma_load_2d(b + half * kHalfCols * kRowBytes, map, full, kb * kBlockK, row[half],
                                         ptx::kEvictNormal);
                }
                ring.advance();
            }
        }
    }
};

template <class C>
struct RowLoader {
    using L = Layout<C>;
    static constexpr u32 kRows = kBlockRows / 2, kRowsPerLane = kRows / 4;  // a warp's share; 8 lanes a row
    static constexpr int kLag = 2;  // k-blocks in flight while the next is asked for
    static constexpr u32 kNoRow = 0xffffffffu;

    Context<C> x;
    u32 part;  // 0 or 1: rows 0 to 63 of each tile, or 64 to 127
    typename Context<C>::Ring ring{x.smem + L::kBarriersAt};
    u32 pending = 0;   // stages filled by cp.async that are not announced yet
    u32 complete = 0;  // experts whose rows have all come
    u32 info_slot = 0;

    MM_DEVICE void run() {
        Walk<C> walk(x);
        Unit t;
        while (walk.next(t)) {
            if (t.down) {
                down(t);
            } else {
                up(t);
            }
            if (++info_slot == L::kInfoTiles) info_slot = 0;
        }
        flush();
    }

  private:
    MM_DEVICE void announce_oldest() {
        const u32 stage = ring.stage >= pending ? ring.stage - pending : ring.stage + C::num_stages - pending;
        if (x.lane == 0) ptx::mbarrier_arrive(ring.full(stage));
        --pending;
    }

    MM_DEVICE void flush() {
        if (pending == 0) return;
        ptx::cp_async_wait<0>();
        ptx::fence_proxy_async_shared();
        __syncwarp();
        while (pending > 0) announce_oldest();
    }

    // Buckets fill in the order of experts; this warp looks at each once.
    MM_DEVICE void await_rows(u32 expert) {
        if (complete > expert) return;
        flush();
        const u32* arrived = x.template own<u32>(x.args.arrived);
        const u32* targets = x.template own<u32>(x.args.targets);
        comm::await_rows(x.waits, arrived, targets, x.slots(), complete, expert, x.lane, kWarpSize);
        __syncwarp();
        complete = expert + 1;
    }

    // Lane l looks up rows l and l + 32 of this warp's share: where they lie in the regions; and leaves for the
    // epilogue where results go (source << 24 | slot) and the weights.
    MM_DEVICE void look_up(const Unit& t, u32 (&row)[2]) const {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const u32 r = part * kRows + i * kWarpSize + x.lane;
            row[i] = kNoRow;
            if (static_cast<i32>(r) >= t.rows) continue;
            u32 j = t.first_row + r;
            for (u32 s = 0; s < x.world(); ++s) {
                const u32 begin = routes_before(x, s, t.expert), n = routes_before(x, s, t.expert + 1) - begin;
                if (j < n) {
                    const Route* routes =
                        x.template own<Route>(x.args.routes) + static_cast<i64>(s) * x.args.max_tokens * C::top_k;
                    const uint4 route = ptx::ld_global_cg_v4(routes + begin + j);
                    row[i] = s * x.args.max_tokens + route.x;
                    ptx::st_shared_v2(x.smem + L::kInfoAt + info_slot * L::kInfo + r * 8, s << 24 | route.y, route.z);
                    break;
                }
                j -= n;
            }
        }
    }

    MM_DEVICE void up(const Unit& t) {
        await_rows(t.expert);
        u32 mine[2];
        look_up(t, mine);
        u32 row[kRowsPerLane];  // of rows 4 i + lane / 8
#pragma unroll
        for (int i = 0; i < static_cast<int>(kRowsPerLane); ++i)
            row[i] = __shfl_sync(0xffffffffu, mine[i / 8], (4 * i + x.lane / 8) % kWarpSize);
        const u8* rows = x.template own<u8>(x.args.rows) + x.lane % 8 * 16;
        const float* scales = x.template own<float>(x.args.row_scales);
        const bool go = !x.waits.aborted();
        for (i32 kb = 0; kb < x.args.up_kb; ++kb) {
            ring.wait_empty(x.ring_limit);
            if (go) {
                const u32 a = x.smem + ring.stage * L::kStage + part * kRows * kRowBytes + x.lane / 8 * kRowBytes;
#pragma unroll
                for (int i = 0; i < static_cast<int>(kRowsPerLane); ++i) {
                    const u32 piece = x.lane % 8 ^ (i % 2 * 4 + x.lane / 8);
                    if (row[i] != kNoRow)
                        ptx::cp_async_16(a + i * 4 * kRowBytes + piece * 16,
                                         rows + static_cast<i64>(row[i]) * x.args.row_pitch + kb * kRowBytes);
                }
                if constexpr (C::block_scaled) {
                    const u32 s = x.smem + L::kScalesAt + ring.stage * L::kScales + (part * kRows + x.lane) * 4;
#pragma unroll
                    for (int i = 0; i < 2; ++i)
                        if (mine[i] != kNoRow)
                            ptx::cp_async_4(s + i * kWarpSize * 4,
                                            scales + static_cast<i64>(mine[i]) * x.args.scale_pitch + kb);
                }
            }
            ptx::cp_async_commit();
            ring.advance();
            if (++pending > kLag) {
                ptx::cp_async_wait<kLag>();
                ptx::fence_proxy_async_shared();
                __syncwarp();
                announce_oldest();
            }
        }
    }

    MM_DEVICE void down(const Unit& t) {
        flush();  // or this CTA's own up tile might never be computed
        u32 mine[2];
        look_up(t, mine);
        if (part == 0) {
            if (x.lane == 0)
                comm::await_tiles(x.waits, x.template own<u32>(x.args.tiles_done), t.block,
                                  x.args.up_tiles * kMathWarps);
            __syncwarp();
            ptx::fence_proxy_async();
        }
        __syncwarp();
        constexpr i32 kBlockK = kRowBytes / C::Elem::kBytes;
        for (i32 kb = 0; kb < x.args.down_kb; ++kb) {
            ring.wait_empty(x.ring_limit);
            if (x.lane == 0) {
                const u32 full = ring.full(ring.stage), a = x.smem + ring.stage * L::kStage;
                if (part == 1 || x.waits.aborted()) {
                    ptx::mbarrier_arrive(full);
                } else {
                    ptx::mbarrier_arrive_expect_tx(full, L::kA + L::kScales);
                    ptx::tma_load_2d(a, &x.args.map_mid, full, kb * kBlockK, t.block * kBlockRows, ptx::kEvictNormal);
                    if constexpr (C::block_scaled)
                        ptx::tma_load_2d(x.smem + L::kScalesAt + ring.stage * L::kScales, &x.args.map_mid_scales, full,
                                         t.block * kBlockRows, kb, ptx::kEvictNormal);
                }
            }
            __syncwarp();
            ring.advance();
        }
    }
};

}  // namespace megamoe::mega
