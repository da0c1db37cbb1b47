// threads RANKS CTAS LAUNCHES SEEDS: the protocol on threads of the host, for ThreadSanitizer, which has the last word.
#include "host.hpp"

int main(int, char** argv) {
    const u32 R = std::atoi(argv[1]), C = std::atoi(argv[2]), launches = std::atoi(argv[3]), seeds = std::atoi(argv[4]);
    for (u32 seed = 0; seed < seeds; ++seed) {
        World W(seed, R, C);
        std::vector<std::thread> threads;
        for (u32 rank = 0; rank < R; ++rank)
            for (u32 cta = 0; cta < C; ++cta)
                for (u32 role = 0; role < kRoles; ++role)
                    threads.emplace_back(
                        [&W, rank, cta, role, launches] { calls(W, rank, cta, role, 0, launches, 0); });
        for (std::thread& t : threads) t.join();
        for (u32 rank = 0; rank < R; ++rank)
            if (W.records[rank].phase) fail("a wait expired", seed, rank, W.records[rank].phase);
    }
    std::printf("%u launches\n", R * launches * seeds);
}
