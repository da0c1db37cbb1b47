// Sizes and places in shared memory, and what every role of a CTA knows.
#pragma once
#include "megamoe/epilogue/store.cuh"
#include "megamoe/mma/operand.cuh"
#include "megamoe/ptx/flags.cuh"
#include "megamoe/sched/grouping.cuh"
#include "megamoe/sync/pipeline.cuh"

namespace megamoe::gemm {

MM_DEVICE constexpr int gcd(int a, int b) {
    return b == 0 ? a : gcd(b, a % b);
}

constexpr u32 kNoteBytes = 32;  // of a tile: rows, place, k-blocks

template <class C>
struct Layout {
    static constexpr int kMathThreads = C::threads - kWarpgroupSize, kMathWarps = kMathThreads / kWarpSize;
    static constexpr bool kVectors = C::scaling == C::Scaling::VECTOR;  // B has 1x128 scales too
    static constexpr bool kScaled = C::scaling == C::Scaling::BLOCK || kVectors;
    static constexpr bool kSplitK = C::share == C::Share::SPLIT_K, kGated = C::activation != C::Activation::NONE;
    // Of two math warpgroups, each takes all columns of every second 64 rows, or half the columns of the same 64 rows;
    // of three, 64 rows.
    static constexpr bool kHalves = C::block_m <= 64;
    static constexpr int kCols = kHalves ? C::block_n / 2 : C::block_n, kRowBlocks = C::block_m == 256 ? 2 : 1;
    // Columns of D that they become: gate and up columns make one.
    static constexpr int kOut = kGated ? kCols / 2 : kCols;
    static constexpr int kColAlign = gcd(128, kHalves ? gcd(C::block_n, C::block_n / 2) : C::block_n);
    // Split K: groups of 8 columns whose sums one CTA collects at most.
    static constexpr int kMine = kSplitK ? (kCols / 8 + C::cluster - 1) / C::cluster : 0;

    static constexpr Major kMajorA = C::a_mn ? Major::MN : Major::K, kMajorB = C::b_mn ? Major::MN : Major::K;
    static constexpr int kRows = C::block_m < 64 ? 64 : C::block_m;  // of the MMAs; those not loaded are not stored
    static constexpr u32 kA = kRows * kRowBytes, kB = C::block_n * kRowBytes;
    static constexpr u32 kStage = kA + kB;
    // Scales of A in a stage. Copies start at multiples of 16 bytes; where a tile may start at any row, up to 3 rows
    // before it come along; a box holds 256 at most, so that 256 rows come in two. Each stands on 128 bytes.
    static constexpr bool kAnyRow = C::Grouping::kGrouped && !C::Grouping::kByK;
    static constexpr u32 kScaleCopies = kAnyRow ? kRowBlocks : 1;
    static constexpr u32 kScaleBox = kAnyRow ? C::block_m / kRowBlocks + 4 : C::block_m;  // rows of one copy
    static constexpr u32 kScalePitch = kAnyRow ? ceil_div((kRows / kRowBlocks + 4) * 4, 128) * 128 : 512;
    static constexpr u32 kScalesA = !kScaled ? 0 : kAnyRow ? kScaleCopies * kScalePitch : kRows * 4;
    static constexpr u32 kScales = kScalesA + (kVectors ? C::block_n * 4 : 0);
    // Per math warp: chunks of staging. The collected sums of split K stand in the same place.
    static constexpr u32 kStaging = kChunkBytes * (C::async_store ? kRowBlocks * kOut / kChunkCols : 1);
    static constexpr u32 kSums = C::cluster * kMine * kMathThreads * 16;

    static constexpr u32 kStagingAt = C::num_stages * kStage;
    static constexpr u32 kScalesAt = kStagingAt + (kSplitK ? kSums : kMathWarps * kStaging);
    static constexpr u32 kBarriersAt = kScalesAt + C::num_stages * kScales;
    static constexpr u32 kSumsBarrierAt = kBarriersAt + C::num_stages * 16;
    static constexpr u32 kAbortAt = kSumsBarrierAt + 8;
    static constexpr u32 kNotesAt = kAbortAt + 8;
    static constexpr u32 kTotal = kNotesAt + (C::told ? C::num_stages * kNoteBytes : 0);
    // A CTA starts with 168 registers a thread (launch bounds), 128 if it has three math warpgroups; its roles can only
    // share those out among themselves. Asking for more in all would block for ever, where no wait's limit sees it.
    static constexpr bool kThree = kMathThreads == 3 * kWarpgroupSize;
    static constexpr int kLoaderRegisters = kThree ? 32 : kSplitK || kVectors || C::a_mn || C::b_mn ? 40 : 24;
    static constexpr int kMathRegisters = kThree ? 160 : kLoaderRegisters == 40 ? 232 : 240;
    static_assert(kMathRegisters * kMathThreads + kLoaderRegisters * kWarpgroupSize <=
                  (kThree ? 128 : 168) * static_cast<int>(C::threads));

    // What the copy engine demands of places in shared memory: whole atoms of the swizzle, 128 bytes without one.
    static_assert(kA % kAtomBytes == 0 && kStage % kAtomBytes == 0 && kStaging % kAtomBytes == 0);
    static_assert(kScalesAt % 128 == 0 && kScales % 128 == 0 && kScalesA % 128 == 0 && kScalePitch % 128 == 0);
    static_assert(!kScaled || (kScaleCopies - 1) * kScalePitch + kScaleBox * 4 <= kScalesA);
    static_assert(kScaleCopies == 1 || kScaleBox * 4 <= kScalePitch);
    static_assert(kBarriersAt % 8 == 0 && (!C::told || kNotesAt % 16 == 0));

    static_assert(kTotal == C::smem_bytes, "the Python estimate of shared memory differs");
    static_assert(kMajorB == Major::K || kCols % kChunkMn == 0, "an MN-major tile is whole chunks");
    static_assert(C::block_m == 16 || C::block_m == 32 || kRows == C::block_m);
    static_assert(kRows == 64 || kRows == 128 || kRows == 192 || kRows == 256);
    static_assert(kThree == (C::block_m == 192) && (kThree || kMathThreads == 2 * kWarpgroupSize));
};

template <class C>
struct Context {
    using L = Layout<C>;
    static constexpr int kReaders = (C::share == C::Share::A || C::share == C::Share::B) ? 2 : 1;
    using Pipe = Pipeline<C::num_stages, kReaders>;
    using Sched = Scheduler<typename C::Grouping, C>;

    const Args& args;
    u32 smem, cta;
    Pipe pipe;
    WaitLimit limit;
    Sched sched;

    // Where C::told, the loader walks the groups for all: the note of a tile stands beside the stage of its first
    // k-block, and is there when that stage is full. No rows: no more tiles.
    MM_DEVICE u32 note(u32 stage) const { return smem + L::kNotesAt + stage * kNoteBytes; }

    MM_DEVICE void tell(const Tile& t) const {
        const u32 at = note(pipe.stage);
        ptx::st_shared_v4(at, make_uint4(t.m0, t.rows, t.n0, t.group));
        ptx::st_shared_i32(at + 16, t.num_kb);
    }

    // Where C::tickets, a CTA's units after its first are what a counter gives: whoever had tiles of few rows comes
    // back sooner. The loader draws as a tile begins; the answer takes a microsecond, and is used when the tile ends.
    MM_DEVICE u32 draw() const { return ptx::atom_add_relaxed_gpu(tickets(), 1); }

    // The last CTA whose draws are over sets both words back for the next launch, whatever the groups' table said.
    MM_DEVICE void draws_are_over() const {
        if (ptx::atom_add_relaxed_gpu(tickets() + 1, 1) == gridDim.x - 1) tickets()[0] = 0, tickets()[1] = 0;
    }

    MM_DEVICE u32* tickets() const { return static_cast<u32*>(args.tickets); }

    // The next tile, by a math warp; false if there is none.
    MM_DEVICE bool next(Tile& t) {
        if constexpr (!C::told) {
            return sched.next(t);
        } else {
            pipe.wait_full(limit);
            // By the lane that gives the stage back: the loader may then write its next note there.
            uint4 v{};
            i32 num_kb = 0;
            if (threadIdx.x % kWarpSize == 0) {
                v = ptx::ld_shared_v4(note(pipe.stage));
                num_kb = ptx::ld_shared_i32(note(pipe.stage) + 16);
            }
            auto all = [](u32 of_first) { return static_cast<i32>(__shfl_sync(0xffffffffu, of_first, 0)); };
            t = Tile{all(v.x), all(v.y), all(v.z), all(v.w), 0, all(num_kb), 0, 0};
            // (After a wait that has expired anything may stand there.)
            return t.rows > 0 && ptx::ld_shared_i32(limit.abort_word) == 0;
        }
    }
};

}  // namespace megamoe::gemm
