// What every role of the mega-kernel sees: sizes, memory of all ranks, shared memory, waits.
//
// `Args` and `Config` are generated from Python (megamoe/mega/config.py) and stand before this include.
#pragma once
#include "megamoe/comm/gpu_memory.cuh"
#include "megamoe/comm/order.cuh"
#include "megamoe/comm/protocol.cuh"
#include "megamoe/epilogue/store.cuh"
#include "megamoe/mega/trace.cuh"
#include "megamoe/mma/operand.cuh"
#include "megamoe/ptx/memory.cuh"
#include "megamoe/ptx/tma.cuh"
#include "megamoe/sync/pipeline.cuh"

namespace megamoe::mega {

constexpr u32 kMathThreads = 256, kHelperThreads = 128, kThreads = kMathThreads + kHelperThreads;
constexpr u32 kMathWarps = kMathThreads / kWarpSize, kWarps = kThreads / kWarpSize;
// 168 registers a thread at launch, shared out: 216 * 256 + 72 * 128 = 168 * 384. In fp8_row copying warps cast, too,
// and no scales stand between the MMAs: 208 * 256 + 88 * 128.
template <class C>
constexpr int kMathRegisters = C::row_scaled ? 208 : 216;
template <class C>
constexpr int kHelperRegisters = C::row_scaled ? 88 : 72;
constexpr i32 kBlockRows = 128, kTileCols = 256, kHalfCols = 128;
constexpr u32 kBand = 32;       // blocks of an expert that share its weights while they are at hand
constexpr i32 kCopyRowsOf = 4;  // rows that are copied into the pool at a time

// Helper warps, behind the math warps: one fills the ring, one takes tickets and settles tiles, two copy rows.
enum HelperWarp : u32 { kLoad = kMathWarps, kLead, kCopyFirst, kCopySecond };
// Named barriers; 0 is __syncthreads.
enum Barrier : u32 { kPlanners = 1, kRolesDone = 2, kResults = 3, kPlanned = 4 };

// One (token, expert) pair, as the source writes it to the owner.
struct alignas(16) Route {
    u32 row;   // of the source's region
    u32 slot;  // token * routes + k: where the result goes at the source
    float weight;
    u32 next;  // with partial sums: 1 + the number of the token's next route at this owner, if any, and kFirstHere
};
constexpr u32 kFirstHere = 1u << 31;  // of the token's routes at this owner this one has the lowest k

// What a tile is, as the leading warp notes it for the others of its CTA. rows < 0: there are no more; 0: a rehearsal.
using Tile = comm::Unit;

// Whether each warpgroup has all rows by half of the columns, or half of the rows by all columns. Which of an expert's
// rows are in its last block differs from call to call, and bits must not: both add up alike.
MM_DEVICE bool has_few_rows(const Tile& t) {
    return t.rows <= 64 && t.first_row >= 0;
}

// What math warps do while the first tile's rows are on their way: its epilogue, beyond all columns, so that nothing is
// written. Its instructions are there then when all multiprocessors want them at once, and weights all of memory.
MM_DEVICE Tile rehearsal(bool few_rows) {
    return {false, 0, 1 << 20, 0, few_rows ? 0 : -1, 0};
}

template <class C>
struct Layout {
    static constexpr u32 kA = kBlockRows * kRowBytes, kB = kTileCols * kRowBytes, kStage = kA + kB;
    static constexpr u32 kScales = C::block_scaled ? kBlockRows * 4 : 0;
    // Notes on the tile at hand and on the next: what it is; of each row, where its result goes and its weight; scales
    // of its weights, two rows of max_kb or, in fp8_row, one for each column.
    static constexpr u32 kNoteRows = 32, kNoteRow = 16, kNoteScales = kNoteRows + kBlockRows * kNoteRow;
    static constexpr u32 kNote = kNoteScales + (C::block_scaled ? 2 * C::max_kb * 4
                                                : C::row_scaled ? kTileCols * 4
                                                                : 0);

    static constexpr u32 kStagingAt = C::num_stages * kStage;
    static constexpr u32 kScalesAt = kStagingAt + kMathWarps * kChunkBytes;
    // Scales of the rows of the two tiles that are noted.
    static constexpr u32 kRowScales = C::row_scaled ? kBlockRows * 4 : 0;
    static constexpr u32 kRowScalesAt = kScalesAt + C::num_stages * kScales;
    static constexpr u32 kNotesAt = kRowScalesAt + 2 * kRowScales;
    static constexpr u32 kRehearsalAt = kNotesAt + 2 * kNote;  // the tile that is rehearsed
    static constexpr u32 kBarriersAt = kRehearsalAt + kNoteRows;
    static constexpr u32 kNoteBarriersAt = kBarriersAt + C::num_stages * 16;
    static constexpr u32 kWordsAt = kNoteBarriersAt + 48;
    // Largest magnitudes of each math warp's 16 rows, of either note's tile.
    static constexpr u32 kMaximaAt = kWordsAt + 48;
    static constexpr u32 kMaxima = C::Elem::kBytes == 1 ? 2 * kMathWarps * 16 * 4 : 0;
    static constexpr u32 kOffsetsAt = kMaximaAt + kMaxima;
    static constexpr u32 kTableAt = kOffsetsAt + 4 * C::max_offsets;
    static constexpr u32 kTotal = kTableAt + 5 * 4 * C::max_slots;
    static_assert(kTotal == C::smem_bytes, "the Python estimate of shared memory differs");
};

// The two notes in turn. told: the leading warp has written what the tile is; ready: and the rest; settled: every math
// warp has done its share of the tile, and nobody reads the note any more.
template <class C>
struct Notes {
    using L = Layout<C>;
    // As a parity: a tile that is there from the start, with whatever stands in the first note for the rest.
    static constexpr u32 kRehearsal = 2;
    u32 smem;
    u32 slot = 0, parity = 0;

    explicit MM_DEVICE Notes(u32 base) : smem(base) {}

    MM_DEVICE u32 told(u32 s) const { return smem + L::kNoteBarriersAt + s * 8; }
    MM_DEVICE u32 ready(u32 s) const { return smem + L::kNoteBarriersAt + 16 + s * 8; }
    MM_DEVICE u32 settled(u32 s) const { return smem + L::kNoteBarriersAt + 32 + s * 8; }
    MM_DEVICE u32 note() const { return smem + L::kNotesAt + slot * L::kNote; }

    MM_DEVICE void init(const Tile& first) const {
        write(smem + L::kRehearsalAt, first);
        for (u32 s = 0; s < 2; ++s) {
            ptx::mbarrier_init(told(s), 1);
            ptx::mbarrier_init(ready(s), 1);
            ptx::mbarrier_init(settled(s), kMathWarps);
        }
    }

    MM_DEVICE void advance() {
        slot ^= 1;
        parity ^= slot == 0;
    }

    // What the tile is; "no more" if the wait has expired: what stands there may be anything.
    MM_DEVICE Tile await_told(const WaitLimit& limit) const { return await(told(slot), limit); }
    // The same, and the rest of the note is there.
    MM_DEVICE Tile await_ready(const WaitLimit& limit) const { return await(ready(slot), limit); }
    MM_DEVICE void await_settled(const WaitLimit& limit) const {
        wait_phase(settled(slot), parity, WaitCode::kEmpty, slot, limit);
    }

    MM_DEVICE void write(const Tile& t) const { write(note(), t); }
    MM_DEVICE Tile read() const { return read(note()); }
    // By math warps, whose parity may be kRehearsal.
    MM_DEVICE Tile at_hand() const { return read(parity == kRehearsal ? smem + L::kRehearsalAt : note()); }

  private:
    static MM_DEVICE void write(u32 to, const Tile& t) {
        ptx::st_shared_v4(to, make_uint4(t.down, t.expert, t.n, t.block));
        ptx::st_shared_v4(to + 16, make_uint4(t.first_row, t.rows, 0, 0));
    }
    static MM_DEVICE Tile read(u32 from) {
        const uint4 a = ptx::ld_shared_v4(from);
        const uint2 b = ptx::ld_shared_v2(from + 16);
        return Tile{a.x != 0, i32(a.y), i32(a.z), i32(a.w), i32(b.x), i32(b.y)};
    }

    MM_DEVICE Tile await(u32 barrier, const WaitLimit& limit) const {
        wait_phase(barrier, parity, WaitCode::kFull, slot, limit);
        Tile t = read();
        if (ptx::ld_shared_i32(limit.abort_word) != 0) t.rows = -1;
        return t;
    }
};

// Words of a CTA. kExchange: a barrier of the math warps, who exchange largest magnitudes behind it. kNextPush: rows of
// the CTA's list of pushes that some warp has taken. kTokens, kEpoch: of this launch. kHeadersCame: 1 once they have.
enum Word : u32 {
    kRingAbort = 0,
    kAbort = 4,
    kNumActive = 8,
    kNumUnits = 12,
    kExchange = 16,
    kNextPush = 24,
    kTokens = 28,
    kEpoch = 32,
    kHeadersCame = 36
};

template <class C>
struct Context {
    using L = Layout<C>;
    using Ring = Pipeline<C::num_stages, 1>;

    const Args& args;
    u8* shared;  // generic address of shared memory
    u32 smem;    // the same as a shared address
    u32 warp, lane;
    i32 tokens;
    u32 cta, ctas;
    WaitLimit ring_limit;
    comm::Waits<comm::GpuMemory> waits;

    // By all lanes of a warp. Each role makes its own, from what it need not keep: registers are short in the main
    // loop.
    static MM_DEVICE Context of(const Args& args, u8* memory) {
        const u32 smem = ptx::smem_addr_anew(memory), thread = ptx::thread_index();
        return {args, memory, smem, __shfl_sync(0xffffffffu, thread / kWarpSize, 0), thread % kWarpSize,
                ptx::ld_shared_i32(smem + L::kWordsAt + kTokens), blockIdx.x, gridDim.x,
                // Loaders wait for other ranks; what waits for loaders has to be more patient.
                WaitLimit{smem + L::kWordsAt + kRingAbort, 2 * args.limit_ns + 1000000000ull,
                          static_cast<WaitRecord*>(args.ring_record)},
                comm::Waits<comm::GpuMemory>{
                    {},
                    static_cast<const u64*>(args.bases),
                    static_cast<u64>(args.abort),
                    reinterpret_cast<volatile u32*>(memory + L::kWordsAt + kAbort),
                    args.limit_ns,
                    static_cast<comm::Record*>(args.record),
                    static_cast<u32>(args.rank),
                    static_cast<u32>(args.world),
                    blockIdx.x,
                    static_cast<u32>(ptx::ld_shared_i32(smem + L::kWordsAt + kEpoch)),
                }};
    }

    MM_DEVICE u32* word(Word w) const { return reinterpret_cast<u32*>(shared + L::kWordsAt + w); }

    // Whether the first k-block of the CTA's first tile has come. By a warp that has not begun to multiply.
    MM_DEVICE bool first_stage_full() const { return Ring(smem + L::kBarriersAt).is_full(); }

    MM_DEVICE u32 exchange() const { return smem + L::kWordsAt + kExchange; }

    // A field of rank `peer`'s symmetric memory.
    template <class T>
    MM_DEVICE T* at(u32 peer, i64 offset) const {
        return reinterpret_cast<T*>(static_cast<const u64*>(args.bases)[peer] + offset);
    }
    template <class T>
    MM_DEVICE T* own(i64 offset) const {
        return reinterpret_cast<T*>(reinterpret_cast<u64>(args.own) + offset);
    }
    // Of the field, which has a counter for each block of rows: this launch's. The others are zeroed for the next one.
    MM_DEVICE u32* counters(i64 field) const { return own<u32>(field) + (*word(kEpoch) & 1) * args.max_blocks; }
    MM_DEVICE comm::Control* control() const { return own<comm::Control>(args.control); }

    // This CTA's part of the trace.
    MM_DEVICE u64* traced() const {
        return static_cast<u64*>(args.trace) +
               static_cast<i64>(cta) * (kTraceHead + kTracks * args.trace_events * kEventWords);
    }

    // By one thread.
    MM_DEVICE void stamp(Moment m) const {
        if constexpr (C::trace) {
            traced()[m] = ptx::global_timer_ns();
            if (m == kStart || m == kEnd) traced()[kTraceCycles + (m == kEnd)] = ptx::clock();
        }
    }

    MM_DEVICE u32 rank() const { return args.rank; }
    MM_DEVICE u32 world() const { return args.world; }
    MM_DEVICE u32 slots() const { return args.slots; }

    // Slot of expert `k` of token t over all ranks, -1 for none; what lies outside of [-1, E) counts as none. From
    // top_k on: the shared experts, which are the first slots of every rank and see its own tokens.
    MM_DEVICE i32 route_slot(i64 t, i32 k) const {
        if (C::num_shared > 0 && k >= C::top_k) return args.rank * args.slots + k - C::top_k;
        const i64 i = t * C::top_k + k;
        const i64 e = C::index_64 ? static_cast<const i64*>(args.topk_idx)[i]
                                  : static_cast<i64>(static_cast<const i32*>(args.topk_idx)[i]);
        const i32 own = args.slots - C::num_shared;
        const i32 at = e >= 0 && e < static_cast<i64>(args.world) * own ? static_cast<i32>(e) : -1;
        return C::num_shared == 0 || at < 0 ? at : at / own * args.slots + C::num_shared + at % own;
    }
};

}  // namespace megamoe::mega
