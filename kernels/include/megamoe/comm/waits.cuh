// Waits that end, between CTAs and ranks: what is awaited, how long, and what is said when it does not come.
// Compiled for the GPU (Mem = GpuMemory, comm/gpu_memory.cuh) and, in tests, as host C++: no PTX, no CUDA word here.
#pragma once
#include "megamoe/common/types.cuh"

namespace megamoe::comm {

// What a wait was for; the host turns it into a sentence (megamoe/mega/record.py).
enum class Phase : u32 {
    kNone = 0,
    kGrid = 1,
    kHeader = 2,
    kRows = 3,
    kTiles = 4,
    kDone = 5,
    kPeer = 6,
    kRing = 7,
    kCopies = 8,
    kKept = 9
};

// What the host reads after a wait has expired (host-mapped); phase stays 0 while all is well, and is written last.
struct Record {
    u32 phase;
    u32 rank;      // who writes this
    u32 peer;      // whom it waited for; kPeer: whom the rank that gave up had waited for
    u32 block;     // CTA
    u32 index;     // local expert, or block of rows; kPeer: the rank that gave up
    u32 expected;  // value awaited; kPeer: the phase in which that rank gave up
    u32 seen;
    u32 epoch;
};

// Words of one rank that only its own CTAs touch. Counters return to 0 within a launch, so that any grid may follow.
struct Control {
    u32 arrived;      // CTAs at the grid barrier
    u32 passed;       // epoch + 1 once all have come
    u32 published;    // CTAs whose routes and headers are written
    u32 finished;     // CTAs whose results are written
    u32 exited;       // CTAs that will touch nothing more
    u32 epoch;        // launches completed
    u32 bad_index;    // some index lay outside of [-1, E)
    u32 ticket;       // units of work handed out
    u32 copy_ticket;  // groups of rows handed out to be copied
    u32 kept;         // CTAs whose rows of y are written, where these are kept for partial sums
    u32 all_kept;     // epoch + 1 once all are
    u32 unused;
};

// Words of one rank that the others reach.
struct Alarm {
    u32 verdict;   // 0, or who gave up on whom: phase << 16 | rank << 8 | peer; any rank may write it
    u32 reported;  // 1 once this rank is writing its record
    u32 epoch;     // launches completed
    u32 pad;
};

// One thread's bounded waits.
template <class Mem>
struct Waits {
    Mem mem;
    const u64* bases;         // every rank's symmetric memory, as this rank addresses it
    u64 alarm_offset;         // where its Alarm stands
    volatile u32* cta_abort;  // this CTA's copy: 1 if the launch is void
    u64 limit_ns;
    Record* record;
    u32 rank, world, block, epoch;

    MM_DEVICE bool aborted() const { return *cta_abort != 0; }

    // True if the launch is void already, perhaps from the one before.
    MM_DEVICE bool void_from_the_start() {
        const u32 verdict = mem.load_relaxed(&alarm(rank)->verdict);
        if (verdict != 0) stop(verdict, Record{});
        return verdict != 0;
    }

    // True once *word has reached `value`, counting modulo 2^32; false if the launch is void.
    template <bool kSystem>
    MM_DEVICE bool until(const u32* word, u32 value, Phase phase, u32 peer, u32 index) {
        u32 seen = load<kSystem>(word);
        if (static_cast<i32>(seen - value) >= 0) return true;
        const u64 start = mem.now_ns();
        // Whoever waits for a rank that may itself be waiting for a third is more patient: so the one next to the
        // missing rank gives up first, and names that rank. Rows may wait for a peer that awaits headers; results,
        // tiles and rows of y for others' rows; a rank that has not begun its call may still be waiting for results in
        // the one before.
        u64 limit = limit_ns;
        if (phase == Phase::kRows) limit += limit_ns / 8;
        if (phase == Phase::kTiles || phase == Phase::kCopies || phase == Phase::kKept || phase == Phase::kDone)
            limit += limit_ns / 4;
        while (!aborted()) {
            mem.pause();
            // The clock first: a thread that has slept through the limit looks at the word once more.
            bool over = mem.now_ns() - start > limit;
            if (phase == Phase::kHeader && over && limit == limit_ns && mem.load_relaxed(&alarm(peer)->epoch) != epoch)
                over = false, limit += limit_ns / 2;
            seen = load<kSystem>(word);
            if (static_cast<i32>(seen - value) >= 0) return true;
            const u32 verdict = mem.load_relaxed(&alarm(rank)->verdict);
            if (verdict != 0 || over)
                stop(verdict, Record{static_cast<u32>(phase), rank, peer, block, index, value, seen, epoch});
        }
        return false;
    }

    // Whether *word has reached `value` by now.
    template <bool kSystem>
    MM_DEVICE bool reached(const u32* word, u32 value) const {
        return static_cast<i32>(load<kSystem>(word) - value) >= 0;
    }

    // Makes the launch void on all ranks, and says why.
    MM_DEVICE void give_up(const Record& r) { stop(0, r); }

    MM_DEVICE Alarm* alarm(u32 peer) const { return reinterpret_cast<Alarm*>(bases[peer] + alarm_offset); }

  private:
    template <bool kSystem>
    MM_DEVICE u32 load(const u32* word) const {
        if constexpr (kSystem) return mem.load_acquire_system(word);
        return mem.load_acquire(word);
    }

    // `verdict`: of whoever has given up before, on this rank or another; 0 if this thread is the one, and `r` says
    // why. The first of this rank's threads to come here writes the record: a host without one would not know that y is
    // void.
    MM_DEVICE void stop(u32 verdict, Record r) {
        *cta_abort = 1;
        if (verdict == 0) {
            verdict = r.phase << 16 | rank << 8 | r.peer;
            if (mem.exchange(&alarm(rank)->verdict, verdict) == 0)
#pragma unroll 1
                for (u32 peer = 0; peer < world; ++peer)
                    if (peer != rank) mem.store_relaxed_system(&alarm(peer)->verdict, verdict);
        } else {
            r = Record{static_cast<u32>(Phase::kPeer),
                       rank,
                       verdict & 0xff,
                       block,
                       verdict >> 8 & 0xff,
                       verdict >> 16,
                       0,
                       epoch};
        }
        if (mem.exchange(&alarm(rank)->reported, 1) != 0) return;
        const u32 phase = r.phase;
        r.phase = 0;
        *record = r;
        mem.fence_system();
        mem.store_relaxed_system(&record->phase, phase);
    }
};

}  // namespace megamoe::comm
