// In place of megamoe/mega/context.cuh and schedule.cuh: what the rows' headers see of it, over memory of this process.
#pragma once
#include "../host_memory.hpp"
#include "megamoe/comm/order.cuh"
#include "megamoe/comm/protocol.cuh"
#include "warp.hpp"

namespace megamoe::mega {

constexpr u32 kThreads = 384, kMathThreads = 256, kMathWarps = 8, kChunkBytes = 2048;
constexpr i32 kBlockRows = 128, kHalfCols = 128, kCopyRowsOf = 4;
enum Word : u32 { kNextPush, kRingAbort, kNumActive };
enum Barrier : u32 { kRolesDone, kResults };
enum Moment : u32 { kResultsIn };

// What mega/add_rows.cuh needs to know of shared memory: that of the ring.
template <class C>
struct Layout {
    static constexpr u32 kStagingAt = C::num_stages * 49152;
};

struct alignas(16) Route {
    u32 row, slot;
    float weight;
    u32 next;
};
constexpr u32 kFirstHere = 1u << 31;

inline volatile u32 never = 0;

struct Waits : comm::Waits<HostMemory> {
    Waits() : comm::Waits<HostMemory>{} { cta_abort = &never; }
};

struct Args {
    u64 own;
    const u64* bases;
    const void *x, *x_scales, *topk_idx, *topk_weights;
    i64 x_ld, x_scales_ld, x_scales_step;
    i64 rows, row_scales, arrived, pushes, histogram, tiles_done, copied, casts_done, header_flags;
    i64 offsets, targets, sent, routes, mid, mid_scales, results, returns, done_flags, y_ld;
    void* y;
    i32 hidden, intermediate, row_pitch, scale_pitch, mid_pitch, mid_rows, max_tokens, max_copies, max_blocks;
    i32 rank, world;
    u32 slots_here;
};

template <class C>
struct Context {
    const Args& args;
    u32 lane;
    i32 tokens = 0;
    u32 warp = 0, cta = 0, ctas = 1;
    Waits waits{};
    u8* shared = nullptr;
    u32* next_push = nullptr;
    bool first_tile_there = false;
    u32 smem = 0;
    WaitLimit ring_limit{};
    const i32* slot_of = nullptr;  // of each route of each token
    i32 routes = 0;
    comm::Control* words = nullptr;
    const u32* offsets = nullptr;  // of the routes of each source, by expert
    comm::Table table{};
    u32* num_active = nullptr;

    u32* word(Word w) const { return w == kNumActive ? num_active : next_push; }
    bool first_stage_full() const { return first_tile_there; }

    template <class T>
    T* at(u32 peer, i64 offset) const {
        return reinterpret_cast<T*>(args.bases[peer] + offset);
    }
    template <class T>
    T* own(i64 offset) const {
        return reinterpret_cast<T*>(args.own + offset);
    }
    comm::Control* control() const { return words; }
    u32 rank() const { return args.rank; }
    u32 world() const { return args.world; }
    u32 slots() const { return args.slots_here; }
    i32 route_slot(i64 t, i32 k) const { return slot_of == nullptr ? -1 : slot_of[t * routes + k]; }
    void stamp(Moment) const {}
};

template <class C>
u32 routes_before(const Context<C>& x, u32 source, u32 expert) {
    return x.offsets[source * (x.slots() + 1) + expert];
}
template <class C>
comm::Table table_of(const Context<C>& x) {
    return x.table;
}

}  // namespace megamoe::mega
