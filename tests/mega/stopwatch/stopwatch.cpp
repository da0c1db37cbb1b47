// mega/trace.cuh's stopwatch on the CPU: the instructions it needs in plain C++, and steps that a test hands in.
#include <cstring>

#include "megamoe/common/types.cuh"

struct uint4 {
    unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
    return {x, y, z, w};
}

namespace megamoe::ptx {
static u32 now;
inline u32 clock() {
    return now;
}
inline u32 lane_zero() {
    return 0;
}
inline void st_global_v4(void* p, uint4 v) {
    std::memcpy(p, &v, sizeof v);
}
inline void red_add_relaxed_gpu(u32* p, u32 v) {
    *p += v;
}
}  // namespace megamoe::ptx

#include "megamoe/mega/trace.cuh"

using namespace megamoe;

struct Context {
    u64* cta;
    struct {
        i32 trace_events;
    } args;
    u64* traced() const { return cta; }
};

// What a role spends from cycle `begin` to `end`.
struct Step {
    u32 spent, begin, end;
    i32 down, expert, block, tile, rows;
};

// One track of one CTA, from the first word of its part on. Returns the words before its events.
extern "C" u32 record(u64* cta, i32 room, u32 track, u32 writes, const Step* steps, u32 count) {
    mega::Stopwatch<true> watch(Context{cta, {room}}, track, writes != 0);
    for (u32 i = 0; i < count; ++i) {
        const Step& s = steps[i];
        ptx::now = s.begin;
        watch.start();
        ptx::now = s.end;
        watch.stop(mega::Spent(s.spent), comm::Unit{s.down != 0, s.expert, s.tile, s.block, 0, s.rows});
    }
    watch.finish();
    return mega::kTraceHead;
}
