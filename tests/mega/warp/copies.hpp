// Bulk copies and their barriers on the CPU, for mega/add_rows.cuh: a copy does nothing until somebody waits for its
// barrier, and a barrier that is awaited in the wrong phase, or with other bytes than were announced, ends the test.
#pragma once
#include <map>
#include <mutex>

#include "context.hpp"

struct Copies {
    struct Copy {
        u32 to;
        const void* from;
        u32 bytes;
    };
    struct Barrier {
        u32 parity = 0, expected = 0;
        bool announced = false;
        std::vector<Copy> copies;
    };
    const void *begin = nullptr, *end = nullptr;  // what may be read
    std::mutex lock;
    std::map<u32, Barrier> barriers;
    std::vector<unsigned char> shared = std::vector<unsigned char>(4 * 49152 + 8 * 2048, 0xee);

    [[noreturn]] static void fail(const char* what) {
        std::printf("%s\n", what);
        std::exit(1);
    }
    void finish() {
        for (auto& [at, b] : barriers)
            if (b.announced || !b.copies.empty()) fail("a copy that nobody awaits");
    }
};
inline Copies* copies_here = nullptr;

namespace megamoe {

enum class WaitCode : u32 { kFull = 1 };

inline void wait_phase(u32 bar, u32 parity, WaitCode, u32, const WaitLimit&) {
    __syncwarp();
    if (lane_here == 0) {
        auto& b = copies_here->barriers.at(bar);
        u32 bytes = 0;
        for (const auto& copy : b.copies) {
            bytes += copy.bytes;
            std::memcpy(copies_here->shared.data() + copy.to, copy.from, copy.bytes);
        }
        if (!b.announced || bytes != b.expected) Copies::fail("bytes that come are not those that were announced");
        if (parity != b.parity) Copies::fail("the wrong phase of a barrier");
        b.copies.clear();
        b.announced = false, b.parity ^= 1;
    }
    __syncwarp();
}

namespace ptx {

constexpr u64 kEvictFirst = 0;

inline void mbarrier_init(u32 bar, u32) {
    const std::lock_guard hold(copies_here->lock);
    copies_here->barriers[bar] = {};
}
inline void mbarrier_init_fence() {}
inline void fence_proxy_async() {}
inline void mbarrier_arrive_expect_tx(u32 bar, u32 bytes) {
    const std::lock_guard hold(copies_here->lock);
    auto& b = copies_here->barriers.at(bar);
    if (b.announced) Copies::fail("a buffer is loaded before it is read");
    b.announced = true, b.expected = bytes;
}
inline void bulk_load(u32 to, const void* from, u32 bytes, u32 bar, u64) {
    if (bytes % 16 || to % 16) Copies::fail("a copy of odd bytes");
    if (from < copies_here->begin || static_cast<const char*>(from) + bytes > copies_here->end)
        Copies::fail("a copy of what is not there");
    const std::lock_guard hold(copies_here->lock);
    copies_here->barriers.at(bar).copies.push_back({to, from, bytes});
}
inline uint4 ld_shared_v4(u32 a) {
    return load<uint4>(copies_here->shared.data() + a);
}
inline u32 pack_bf16(float lo, float hi) {
    return to_bf16(lo) | static_cast<u32>(to_bf16(hi)) << 16;
}

}  // namespace ptx
}  // namespace megamoe
