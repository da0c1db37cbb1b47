// What a traced kernel writes down of each CTA: when it passed certain moments, how many cycles its roles spent on
// what, and one after another what each role did. Other kernels hold none of it. megamoe/mega/trace.py reads it.
#pragma once
#include "megamoe/comm/order.cuh"
#include "megamoe/ptx/flags.cuh"
#include "megamoe/ptx/memory.cuh"
#include "megamoe/ptx/thread.cuh"

namespace megamoe::mega {

// Moments of a CTA, in nanoseconds of the device's clock.
enum Moment : u32 { kStart, kSorted, kToldPlan, kFirstRows, kPushed, kMathDone, kResultsIn, kEnd, kMoments };

// What a role of a CTA spends its cycles on.
enum Spent : u32 {
    kMathNote,
    kMathUp,
    kMathStoreUp,
    kMathDown,
    kMathStoreDown,
    kLoadEmpty,
    kLoadRows,
    kLoadNote,
    kLeadNote,
    kLeadSettle,
    kCopyWait,
    kCopyRows,
    kMathStage,  // the first stage of a tile
    kCopyPlace,  // in the pool
    kCopyPush,
    kSpents
};

// Who writes events, one lane each: warp 0 of a math warpgroup, and the helper warps.
enum Track : u32 { kTrackMath, kTrackMathSecond, kTrackLoad, kTrackLead, kTrackCopyFirst, kTrackCopySecond, kTracks };

// Of a CTA's part of the trace, in words of 8 bytes: moments, sums of cycles, this multiprocessor's cycles at the first
// and the last moment, how many events each track had. Then each track's room for events.
constexpr u32 kTraceCycles = u32{kMoments} + u32{kSpents}, kTraceCounts = kTraceCycles + 2;
constexpr u32 kTraceHead = (kTraceCounts + kTracks + 1) / 2 * 2, kEventWords = 2;  // events stand on 16 bytes
// An event: cycles at its begin and end; what it was << 24, second GEMM << 23, local expert; block << 12, column tile.
constexpr u32 kNoExpert = 0x7fffff, kNoBlock = 0xffffffff;
constexpr u32 kShortestEvent = 64;  // cycles; what took less is in the sums alone

// A stopwatch of one role of a traced kernel; nothing in others. All lanes may hold one, `writes` says which one
// counts.
template <bool kOn>
struct Stopwatch {
    u64* cta;  // its part of the trace; null in lanes that write nothing
    u32 track, room;
    u32 since = 0, events = 0;

    template <class Context>
    MM_DEVICE Stopwatch(const Context& x, u32 which, bool writes)
        : cta(writes ? x.traced() : nullptr), track(which), room(x.args.trace_events) {}

    MM_DEVICE void start() { since = now(); }

    // What began when the watch was started, or stopped before, is over; `t`: the tile that it was for.
    MM_DEVICE void stop(Spent s, const comm::Unit& t) {
        const u32 begin = since;
        since = now();
        if (cta == nullptr) return;
        // One of two alike stands for both in the sums.
        const bool twin = track == kTrackMathSecond || (track == kTrackCopySecond && s != kCopyPush);
        if (!twin) ptx::red_add_relaxed_gpu(reinterpret_cast<u32*>(cta + kMoments + s), since - begin);
        if (s == kLoadEmpty || since - begin < kShortestEvent) return;
        if (events < room) {
            const bool tile = t.rows > 0;
            const u32 what = tile ? u32(t.down) << 23 | u32(t.expert) : kNoExpert;
            const u32 where = tile ? u32(t.block) << 12 | u32(t.n) : kNoBlock;
            ptx::st_global_v4(cta + kTraceHead + (track * room + events) * kEventWords,
                              make_uint4(begin, since, s << 24 | what, where));
        }
        ++events;
    }

    // The role is over.
    MM_DEVICE void finish() const {
        if (cta != nullptr) cta[kTraceCounts + track] = events;
    }

  private:
    // From a uniform register ptxas would not copy it: it reads the clock once more, later.
    static MM_DEVICE u32 now() { return ptx::clock() + ptx::lane_zero(); }
};
template <>
struct Stopwatch<false> {
    template <class Context>
    MM_DEVICE Stopwatch(const Context&, u32, bool) {}
    MM_DEVICE void start() {}
    MM_DEVICE void stop(Spent, const comm::Unit&) {}
    MM_DEVICE void finish() const {}
};

}  // namespace megamoe::mega
