// The helper warps that fill the ring: one brings weights, which wait for nobody; two bring rows: gathered from where
// the sources pushed them (up), or as blocks of activations that this rank's CTAs have written (down). The first of
// these two leads: it takes the tickets and notes what the tiles are.
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
    Notes<C> notes{x.smem};

    Stopwatch<C::trace> watch;

    // By one lane.
    MM_DEVICE void run() {
        constexpr i32 kBlockK = kRowBytes / C::Elem::kBytes;
        for (;; notes.advance()) {
            notes.await_told(x.ring_limit);
            const Tile t = notes.read();
            if (t.rows < 0) break;
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
                watch.start();
                ring.wait_empty(x.ring_limit);
                watch.stop(kWeightsEmpty);
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
        watch.write(x.traced(), kWeightsEmpty, kWeightsEmpty);
    }
};

template <class C>
struct RowLoader {
    using L = Layout<C>;
    static constexpr u32 kRows = kBlockRows / 2, kRowsPerLane = kRows / 4;  // a warp's share; 8 lanes a row
    static constexpr i32 kAhead = 4;  // k-blocks before a tile's end at which the next is looked up
    static constexpr u32 kNoRow = 0xffffffffu;
    static constexpr int kScaleLoads = (C::max_kb + kWarpSize - 1) / kWarpSize;

    Context<C> x;
    u32 part;  // 0 or 1: rows 0 to 63 of each tile, or 64 to 127
    typename Context<C>::Ring ring{x.smem + L::kBarriersAt};
    Notes<C> notes{x.smem};
    u32 complete = 0;  // experts whose rows have all come
    Stopwatch<C::trace> watch;

    // What is fetched for the next tile while the last k-blocks of this one are on their way.
    Tile next;
    uint4 route[2];                                  // lane l: of rows l and l + 32 of this warp's share
    u32 base[2];                                     // first row of the route's source, kNoRow without a route
    float scale[C::block_scaled ? kScaleLoads : 1];  // of the weights, this part's half, k-block 32 i + lane

    MM_DEVICE void run() {
        comm::Walk walk = walk_of(x);
        fetch(walk);
        for (;;) {
            const Tile t = next;
            u32 mine[2];  // rows l and l + 32: where they lie in the regions
            watch.start();
            note(t, mine);
            watch.stop(kRowsNote);
            if (t.rows < 0) break;
            if (t.down) {
                down(t, walk);
            } else {
                up(t, mine, walk);
            }
        }
        if (part == 0 && x.lane == 0) watch.write(x.traced(), kRowsEmpty, kRowsTiles);
    }

  private:
    // The next tile, and what has to be known of it: loads that nobody waits for yet.
    MM_DEVICE void fetch(comm::Walk& walk) {
        if (part == 0) {
            u32 unit = 0;
            if (x.lane == 0) unit = ptx::atom_add_relaxed_gpu(&x.control()->ticket, 1);
            next = walk.at<static_cast<u32>(kBlockRows)>(__shfl_sync(0xffffffffu, unit, 0));
            if (x.lane == 0) {
                notes.write(next);
                ptx::mbarrier_arrive(notes.told(notes.slot));
            }
        } else {
            notes.await_told(x.ring_limit);
            next = notes.read();
        }
        if (next.rows < 0) return;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const u32 r = part * kRows + i * kWarpSize + x.lane;
            base[i] = kNoRow;
            if (static_cast<i32>(r) >= next.rows) continue;
            u32 j = next.first_row + r;
            for (u32 s = 0; s < x.world(); ++s) {
                const u32 begin = routes_before(x, s, next.expert), n = routes_before(x, s, next.expert + 1) - begin;
                if (j < n) {
                    base[i] = s;
                    route[i] = ptx::ld_global_cg_v4(x.template own<Route>(x.args.routes) +
                                                    static_cast<i64>(s) * x.args.max_tokens * C::top_k + begin + j);
                    break;
                }
                j -= n;
            }
        }
        if constexpr (C::block_scaled) {
            // The block of gate and the one of up beside it, or the two of a down tile.
            const i32 blocks = next.down ? x.args.down_kb : x.args.up_kb;
            const i32 rows = ceil_div(next.down ? x.args.hidden : x.args.intermediate, 128);
            i64 row;
            const float* from;
            if (next.down) {
                from = static_cast<const float*>(x.args.scales_w2);
                row = static_cast<i64>(next.expert) * rows + min_of(next.n * 2 + static_cast<i32>(part), rows - 1);
            } else {
                from = static_cast<const float*>(x.args.scales_w13);
                row = (static_cast<i64>(next.expert) * 2 + part) * rows + next.n;
            }
#pragma unroll
            for (int i = 0; i < kScaleLoads; ++i) {
                const i32 kb = i * kWarpSize + x.lane;
                scale[i] = kb < blocks ? ptx::ld_global_nc_f32(from + row * blocks + kb) : 0.f;
            }
        }
    }

    // Leaves for the math warps what was fetched: source << 24 | slot and weight of each row, scales.
    MM_DEVICE void note(const Tile& t, u32 (&mine)[2]) {
        if (t.rows >= 0) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                mine[i] = kNoRow;
                if (base[i] == kNoRow) continue;
                const u32 r = part * kRows + i * kWarpSize + x.lane;
                mine[i] = base[i] * x.args.max_tokens + route[i].x;
                ptx::st_shared_v2(notes.note() + L::kNoteRows + r * 8, base[i] << 24 | route[i].y, route[i].z);
            }
            if constexpr (C::block_scaled) {
#pragma unroll
                for (int i = 0; i < kScaleLoads; ++i) {
                    const u32 kb = i * kWarpSize + x.lane;
                    if (kb < u32(C::max_kb))
                        ptx::st_shared_f32(notes.note() + L::kNoteScales + (part * C::max_kb + kb) * 4, scale[i]);
                }
            }
        }
        __syncwarp();
        if (x.lane == 0) ptx::mbarrier_arrive(notes.complete(notes.slot));
        notes.advance();
    }

    // Buckets fill in the order of experts; this warp looks at each once.
    MM_DEVICE void await_rows(u32 expert) {
        if (complete > expert) return;
        const bool first = complete == 0;
        const u32* arrived = x.template own<u32>(x.args.arrived);
        const u32* targets = x.template own<u32>(x.args.targets);
        comm::await_rows(x.waits, arrived, targets, x.slots(), complete, expert, x.lane, kWarpSize);
        __syncwarp();
        complete = expert + 1;
        if (first && part == 0 && x.lane == 0) x.stamp(kFirstRows);
    }

    MM_DEVICE void up(const Tile& t, const u32 (&mine)[2], comm::Walk& walk) {
        watch.start();
        await_rows(t.expert);
        watch.stop(kRowsArrive);
        // Of rows 4 i + lane / 8: distance in 16 bytes; bit i of `valid` if there is a row.
        u32 row[kRowsPerLane], valid = 0;
#pragma unroll
        for (int i = 0; i < static_cast<int>(kRowsPerLane); ++i) {
            const u32 r = __shfl_sync(0xffffffffu, mine[i / 8], (4 * i + x.lane / 8) % kWarpSize);
            if (r != kNoRow) valid |= 1u << i;
            row[i] = r == kNoRow ? 0 : r * (x.args.row_pitch / 16);
        }
        const u8* rows = x.template own<u8>(x.args.rows) + x.lane % 8 * 16;
        const float* scales = x.template own<float>(x.args.row_scales);
        if (x.waits.aborted()) valid = 0;
        const i32 look = max_of(x.args.up_kb - kAhead, 0);
        const u32 lane_at = (part * kRows + x.lane / 8) * kRowBytes;
        const u32 even = lane_at + (x.lane % 8 ^ x.lane / 8) * 16, odd = lane_at + (x.lane % 8 ^ (4 + x.lane / 8)) * 16;
        for (i32 kb = 0; kb < x.args.up_kb; ++kb) {
            watch.start();
            ring.wait_empty(x.ring_limit);
            watch.stop(kRowsEmpty);
            const u32 a = x.smem + ring.stage * L::kStage;
#pragma unroll
            for (int i = 0; i < static_cast<int>(kRowsPerLane); ++i) {
                // Addresses for all, copies for those that exist: addresses then don't wait for one another.
                const u8* from = rows + static_cast<u64>(row[i]) * 16;
                if (valid >> i & 1) ptx::cp_async_16(a + (i % 2 ? odd : even) + i * 4 * kRowBytes, from);
            }
            rows += kRowBytes;
            if constexpr (C::block_scaled) {
                const u32 s = x.smem + L::kScalesAt + ring.stage * L::kScales + (part * kRows + x.lane) * 4;
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    if (mine[i] != kNoRow && valid != 0)
                        ptx::cp_async_4(s + i * kWarpSize * 4,
                                        scales + static_cast<i64>(mine[i]) * x.args.scale_pitch + kb);
            }
            ptx::cp_async_arrive(ring.full(ring.stage));
            ring.advance();
            if (kb == look) {
                watch.start();
                fetch(walk);
                watch.stop(kRowsFetch);
            }
        }
    }

    MM_DEVICE void down(const Tile& t, comm::Walk& walk) {
        watch.start();
        if (part == 0) {
            if (x.lane == 0)
                comm::await_tiles(x.waits, x.template own<u32>(x.args.tiles_done), t.block,
                                  x.args.up_tiles * kMathWarps);
            __syncwarp();
            ptx::fence_proxy_async();
        }
        __syncwarp();
        watch.stop(kRowsTiles);
        constexpr i32 kBlockK = kRowBytes / C::Elem::kBytes;
        const i32 look = max_of(x.args.down_kb - kAhead, 0);
        for (i32 kb = 0; kb < x.args.down_kb; ++kb) {
            watch.start();
            ring.wait_empty(x.ring_limit);
            watch.stop(kRowsEmpty);
            if (x.lane == 0) {
                const u32 full = ring.full(ring.stage), a = x.smem + ring.stage * L::kStage;
                if (part == 1 || x.waits.aborted()) {
                    ptx::mbarrier_arrive_many(full, kWarpSize);
                } else {
                    ptx::mbarrier_arrive_many(full, kWarpSize - 1);
                    ptx::mbarrier_arrive_expect_tx(full, L::kA + L::kScales);
                    ptx::tma_load_2d(a, &x.args.map_mid, full, kb * kBlockK, t.block * kBlockRows, ptx::kEvictNormal);
                    if constexpr (C::block_scaled)
                        ptx::tma_load_2d(x.smem + L::kScalesAt + ring.stage * L::kScales, &x.args.map_mid_scales, full,
                                         t.block * kBlockRows, kb, ptx::kEvictNormal);
                }
            }
            __syncwarp();
            ring.advance();
            if (kb == look) {
                watch.start();
                fetch(walk);
                watch.stop(kRowsFetch);
            }
        }
    }
};

}  // namespace megamoe::mega
