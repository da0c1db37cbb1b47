// The protocol between the ranks of a mega-kernel: who writes which word, and who waits for it. docs/protocol.md draws
// it. Compiled for the GPU (Mem = GpuMemory, comm/gpu_memory.cuh) and, in tests, as host C++: no PTX, no CUDA word
// here.
//
// What is split over threads takes (part, parts): a lane and 32, a thread and all of them.
#pragma once
#include "megamoe/comm/waits.cuh"

namespace megamoe::comm {

// All CTAs of one rank, once a launch for each pair of words. By one thread of each CTA, after the CTA's other threads
// have synchronised with it.
template <class Mem>
MM_DEVICE bool meet(Waits<Mem>& w, u32* come, u32* all, u32 ctas, Phase phase) {
    if (w.mem.add(come, 1) == ctas - 1) {
        w.mem.store_relaxed(come, 0);
        w.mem.store_release(all, w.epoch + 1);
        return true;
    }
    return w.template until<false>(all, w.epoch + 1, phase, w.rank, 0);
}

// Slices are counted.
template <class Mem>
MM_DEVICE bool grid_barrier(Waits<Mem>& w, Control* c, u32 ctas) {
    return meet(w, &c->arrived, &c->passed, ctas, Phase::kGrid);
}

// One thread of each CTA says that the CTA's writes, to whichever rank, are done; the last one tells every rank by
// writing epoch + 1 to its own place among the flags there. A CTA whose launch is void says nothing, so that nobody
// takes what it has left undone: the counter then stays where it is until reset().
template <class Mem>
MM_DEVICE void announce(Waits<Mem>& w, u32* counter, u32 ctas, u64 flags_offset) {
    if (w.aborted()) return;
    w.mem.fence_system();
    if (w.mem.add(counter, 1) != ctas - 1) return;
    w.mem.store_relaxed(counter, 0);
    w.mem.fence_system();  // with the stores after it: a release, once for all peers
#pragma unroll 1
    for (u32 peer = 0; peer < w.world; ++peer)
        w.mem.store_relaxed_system(reinterpret_cast<u32*>(w.bases[peer] + flags_offset) + w.rank, w.epoch + 1);
}

// Routes and headers are written.
template <class Mem>
MM_DEVICE void announce_headers(Waits<Mem>& w, Control* c, u32 ctas, u64 flags_offset) {
    announce(w, &c->published, ctas, flags_offset);
}

// One CTA has written all of this rank's routes and header for `owner`, and tells it.
template <class Mem>
MM_DEVICE void announce_header(Waits<Mem>& w, u32 owner, u64 flags_offset) {
    if (w.aborted()) return;
    w.mem.fence_system();
    w.mem.store_relaxed_system(reinterpret_cast<u32*>(w.bases[owner] + flags_offset) + w.rank, w.epoch + 1);
}

// `expired`: the CTA's own loaders or math warps waited too long for one another.
template <class Mem>
MM_DEVICE void judge_ring(Waits<Mem>& w, bool expired) {
    if (expired && !w.aborted())
        w.give_up(Record{static_cast<u32>(Phase::kRing), w.rank, w.rank, w.block, 0, 0, 0, w.epoch});
}

// Partial sums: one thread of each CTA, when the CTA's rows of y are written, waits for those of all CTAs of the rank.
// As in announce(), a CTA whose launch is void does not come: nobody adds up what it has left undone.
template <class Mem>
MM_DEVICE bool meet_behind_rows(Waits<Mem>& w, Control* c, u32 ctas, bool ring_expired) {
    judge_ring(w, ring_expired);
    return !w.aborted() && meet(w, &c->kept, &c->all_kept, ctas, Phase::kKept);
}

// Results are written.
template <class Mem>
MM_DEVICE void announce_results(Waits<Mem>& w, Control* c, u32 ctas, u64 flags_offset, bool ring_expired) {
    judge_ring(w, ring_expired);
    announce(w, &c->finished, ctas, flags_offset);
}

// One thread of each CTA, when the CTA will touch nothing more: the last one ends the epoch.
template <class Mem>
MM_DEVICE void leave(Waits<Mem>& w, Control* c, u32 ctas) {
    if (w.mem.add(&c->exited, 1) != ctas - 1) return;
    w.mem.store_relaxed(&c->exited, 0);
    w.mem.store_relaxed(&c->ticket, 0);
    w.mem.store_relaxed(&c->copy_ticket, 0);
    w.mem.store_relaxed_system(&w.alarm(w.rank)->epoch, w.epoch + 1);
    w.mem.store_release(&c->epoch, w.epoch + 1);
}

// What a source tells an owner: where the routes of each of its experts begin, and how many of the source's rows must
// have come, since the beginning, when an expert's are complete. `routes` and `rows`: exclusive sums over all ranks'
// slots, from the owner's first one; `sent`: the source's own account of the rows so far.
template <class Mem>
MM_DEVICE void tell(const Waits<Mem>& w, u32* offsets, u32* targets, u32* sent, const u32* routes, const u32* rows,
                    u32 slots, u32 part, u32 parts) {
    offsets += w.rank * (slots + 1), targets += w.rank * slots;
    for (u32 i = part; i <= slots; i += parts) {
        w.mem.store(offsets + i, routes[i] - routes[0]);
        if (i == slots) continue;
        const u32 total = w.mem.load(sent + i) + rows[i + 1] - rows[i];
        w.mem.store(sent + i, total);
        w.mem.store(targets + i, total);
    }
}

template <class Mem>
MM_DEVICE void await_headers(Waits<Mem>& w, const u32* flags, u32 part, u32 parts) {
#pragma unroll 1
    for (u32 s = part; s < w.world; s += parts) w.template until<true>(flags + s, w.epoch + 1, Phase::kHeader, s, 0);
}

template <class Mem>
MM_DEVICE void await_results(Waits<Mem>& w, const u32* flags, u32 part, u32 parts) {
#pragma unroll 1
    for (u32 s = part; s < w.world; s += parts) w.template until<true>(flags + s, w.epoch + 1, Phase::kDone, s, 0);
}

// The thread that has pushed a row to its owner (after the others of its warp) counts it.
template <class Mem>
MM_DEVICE void count_row(const Mem& mem, u32* arrived) {
    mem.fence_system();
    mem.add_relaxed_system(arrived, 1);
}

// Rows of the experts number `first` to `last` of the list, of every source. A row lies with the first expert that
// needs it, and sources send in the order of experts: all up to an expert have to be there. The list may leave out
// experts that no row is for.
template <class Mem>
MM_DEVICE void await_rows(Waits<Mem>& w, const u32* arrived, const u32* targets, u32 slots, const u32* experts,
                          u32 first, u32 last, u32 part, u32 parts) {
    const u32 count = (last + 1 - first) * w.world;
#pragma unroll 1
    for (u32 i = part; i < count; i += parts) {
        const u32 e = experts[first + i / w.world], s = i % w.world, at = s * slots + e;
        w.template until<true>(arrived + at, w.mem.load(targets + at), Phase::kRows, s, e);
    }
}

// Whether a pair's rows are there by now: of the expert number first + part / world of the list of `active`, from
// source part % world.
template <class Mem>
MM_DEVICE bool rows_there(const Waits<Mem>& w, const u32* arrived, const u32* targets, u32 slots, const u32* experts,
                          u32 first, u32 active, u32 part) {
    const u32 a = first + part / w.world;
    if (a >= active) return false;
    const u32 at = part % w.world * slots + experts[a];
    return w.template reached<true>(arrived + at, w.mem.load(targets + at));
}

// A tile of the first GEMM is written, or a group of rows copied into the pool, or cast.
template <class Mem>
MM_DEVICE void count_tile(const Mem& mem, u32* done) {
    mem.add_release(done, 1);
}

// All groups of rows of a block that have to be copied into the pool, or cast, counted by count_tile.
template <class Mem>
MM_DEVICE void await_copies(Waits<Mem>& w, const u32* copied, u32 block, u32 groups) {
    w.template until<false>(copied + block, groups, Phase::kCopies, w.rank, block);
}

// All tiles of the first GEMM of a block of rows.
template <class Mem>
MM_DEVICE void await_tiles(Waits<Mem>& w, const u32* tiles_done, u32 block, u32 tiles) {
    w.template until<false>(tiles_done + block, tiles, Phase::kTiles, w.rank, block);
}

}  // namespace megamoe::comm
