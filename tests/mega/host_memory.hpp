// The memory of comm/protocol.cuh on a CPU: words by std::atomic_ref, data by plain accesses. An observer sees every
// access before it happens, and may let other threads go first; without one, threads of the host run freely.
#pragma once
#include <atomic>
#include <chrono>
#include <thread>

#include "megamoe/common/types.cuh"

using megamoe::i32;
using megamoe::u32;
using megamoe::u64;

enum class Scope { kGpu, kSystem };
enum class Effect { kNone, kAcquire, kRelease, kBoth };

struct Observer {
    virtual void data(const u32* p, bool write) = 0;
    virtual void word_load(const u32* p, Effect effect, Scope scope) = 0;
    virtual void word_store(const u32* p, Effect effect, Scope scope) = 0;
    virtual void word_update(const u32* p, Effect effect, Scope scope) = 0;
    virtual void fence() = 0;
    virtual void pause() = 0;
    virtual u64 now_ns() = 0;

  protected:
    ~Observer() = default;
};

inline Observer* observer = nullptr;
// ThreadSanitizer knows no fences: without an observer, what follows one releases, up to the next plain store.
inline thread_local bool fenced = false;

struct HostMemory {
    // Data under a flag.
    u32 load(const u32* p) const {
        if (observer) observer->data(p, false);
        return *p;
    }
    void store(u32* p, u32 v) const {
        if (observer) observer->data(p, true);
        fenced = false;
        *p = v;
    }

    // Words.
    u32 load_acquire(const u32* p) const { return load_word(p, Effect::kAcquire, Scope::kGpu); }
    u32 load_acquire_system(const u32* p) const { return load_word(p, Effect::kAcquire, Scope::kSystem); }
    u32 load_relaxed(const u32* p) const { return load_word(p, Effect::kNone, Scope::kSystem); }
    void store_relaxed(u32* p, u32 v) const { store_word(p, v, Effect::kNone, Scope::kSystem); }
    void store_relaxed_system(u32* p, u32 v) const { store_word(p, v, Effect::kNone, Scope::kSystem); }
    void store_release(u32* p, u32 v) const { store_word(p, v, Effect::kRelease, Scope::kGpu); }
    u32 add(u32* p, u32 v) const { return add_word(p, v, Effect::kBoth, Scope::kGpu); }
    u32 add_relaxed(u32* p, u32 v) const { return add_word(p, v, Effect::kNone, Scope::kGpu); }
    void add_release(u32* p, u32 v) const { add_word(p, v, Effect::kRelease, Scope::kGpu); }
    void add_relaxed_system(u32* p, u32 v) const { add_word(p, v, Effect::kNone, Scope::kSystem); }
    // Tests only: what the host's own barriers do between launches.
    u32 add_system(u32* p, u32 v) const { return add_word(p, v, Effect::kBoth, Scope::kSystem); }
    u32 exchange(u32* p, u32 v) const {
        if (observer) observer->word_update(p, Effect::kBoth, Scope::kSystem);
        return std::atomic_ref(*p).exchange(v, std::memory_order_acq_rel);
    }

    void fence_system() const {
        if (observer) observer->fence();
        fenced = true;
    }
    u64 now_ns() const {
        if (observer) return observer->now_ns();
        return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count();
    }
    void pause() const { observer ? observer->pause() : std::this_thread::yield(); }

  private:
    // Orders are written out: g++ takes one that it does not know for the strictest.
    static bool releases(Effect effect) { return effect == Effect::kRelease || effect == Effect::kBoth || fenced; }
    static u32 load_word(const u32* p, Effect effect, Scope scope) {
        if (observer) observer->word_load(p, effect, scope);
        const std::atomic_ref word(*const_cast<u32*>(p));
        if (effect == Effect::kAcquire) return word.load(std::memory_order_acquire);
        return word.load(std::memory_order_relaxed);
    }
    static void store_word(u32* p, u32 v, Effect effect, Scope scope) {
        if (observer) observer->word_store(p, effect, scope);
        const std::atomic_ref word(*p);
        if (releases(effect)) {
            word.store(v, std::memory_order_release);
        } else {
            word.store(v, std::memory_order_relaxed);
        }
    }
    static u32 add_word(u32* p, u32 v, Effect effect, Scope scope) {
        if (observer) observer->word_update(p, effect, scope);
        const std::atomic_ref word(*p);
        if (effect == Effect::kBoth) return word.fetch_add(v, std::memory_order_acq_rel);
        if (releases(effect)) return word.fetch_add(v, std::memory_order_release);
        return word.fetch_add(v, std::memory_order_relaxed);
    }
};
