// Rows that a warp pushes, and rows that it casts, against plain loops. Returns 1 at the first that is wrong.
#include "megamoe/mega/cast_rows.cuh"
#include "megamoe/mega/push.cuh"

namespace {

using namespace megamoe::mega;

// Bytes that start on 256 and say 0xee where nobody has written.
struct Block {
    std::vector<u8> bytes;
    explicit Block(std::size_t size) : bytes(size + 256, 0xee) {}
    u64 base() { return (reinterpret_cast<u64>(bytes.data()) + 255) / 256 * 256; }
};

float drawn(int row, int col) {
    const float v = (std::rand() / static_cast<float>(RAND_MAX) - 0.5f) * (1 + row % 7) * (col % 13 == 0 ? 9 : 1);
    if (row == 3 && col == 5) return std::numeric_limits<float>::infinity();
    if (row == 4 && col == 2) return std::numeric_limits<float>::quiet_NaN();
    return row == 5 ? 0.f : v;
}

float scale_of(float amax) {
    return amax == 0 ? 1.f : std::max(amax / 448.f, std::ldexp(1.f, -126));
}

u32 code_of(float v, float scale) {
    return std::isfinite(v) ? to_e4m3(v * (1.f / scale)) : 0x7f;
}

template <class V>
float amax_of(const V& value, int begin, int end) {
    float amax = 0;
    for (int c = begin; c < end; ++c)
        if (std::isfinite(value(c))) amax = std::max(amax, std::fabs(value(c)));
    return amax;
}

template <class T>
void expect(T got, T want, const char* what, int size, int row, int col) {
    if (got == want) return;
    std::printf("%s, %d columns, row %d, column %d: got %g, expected %g\n", what, size, row, col,
                static_cast<double>(got), static_cast<double>(want));
    std::exit(1);
}

struct Row {
    static constexpr int copies = 6;
};

// `rows` rows of a block, a group at a time, as a copying warp takes them.
int cast_rows(int inter, int rows) {
    constexpr int kBlock = 1, kMidRows = 256;
    const int pitch = ceil_div(inter, 16) * 32, blocks = ceil_div(inter, 128);
    Args args{};
    args.mid = 1024, args.mid_scales = args.mid + kMidRows * pitch, args.mid_pitch = pitch, args.mid_rows = kMidRows;
    args.intermediate = inter;
    Block memory(args.mid_scales + blocks * kMidRows * 4);
    args.own = memory.base();
    auto* mid = reinterpret_cast<u8*>(args.own + args.mid) + kBlock * 128 * pitch;
    auto* scales = reinterpret_cast<float*>(args.own + args.mid_scales) + kBlock * 128;
    std::vector<std::vector<float>> stored(rows, std::vector<float>(inter));
    for (int r = 0; r < rows; ++r) {
        for (int c = 0; c < inter; ++c) {
            const float v = drawn(r, c);  // the epilogue leaves NaN for infinities
            const u16 word = to_bf16(std::isfinite(v) ? v : std::numeric_limits<float>::quiet_NaN());
            stored[r][c] = from_bf16(word);
            std::memcpy(mid + r * pitch + c * 2, &word, 2);
        }
        for (int b = 0; b < blocks; ++b)
            scales[b * kMidRows + r] =
                amax_of([&](int c) { return stored[r][c]; }, b * 128, std::min(inter, b * 128 + 128));
    }
    for (int r = 0; r < rows; r += kCopyRowsOf)
        run_warp([&](u32 lane) {
            const Context<Row> x{args, lane};
            RowCaster<Row>{x}.cast(kBlock * 128 + r, std::min(rows - r, int{kCopyRowsOf}));
        });
    for (int r = 0; r < rows; ++r) {
        const float scale = scale_of(amax_of([&](int c) { return stored[r][c]; }, 0, inter));
        expect(scales[r], scale, "scale of a cast row", inter, r, 0);
        for (int c = 0; c < inter; ++c)
            expect<u32>(mid[r * pitch + c], code_of(stored[r][c], scale), "code of a cast row", inter, r, c);
    }
    for (int c = 0; c < pitch; ++c) expect<u32>(mid[rows * pitch + c], 0xee, "byte behind the rows", inter, rows, c);
    return rows;
}

template <class P, class E, bool kRowScaled>
struct Config {
    using Piece = P;
    using Elem = E;
    static constexpr bool row_scaled = kRowScaled, index_64 = true;
    static constexpr int routes = 2, top_k = 2;
};

// n rows of rank 1's list, from the second on, to both ranks.
template <class P, class E, bool kRowScaled, bool kQuantised>
int push(const char* what, int hidden, int n) {
    using C = Config<P, E, kRowScaled>;
    constexpr int kTokens = 9, kWorld = 2, kSlots = 3;
    const int blocks = kRowScaled ? 1 : ceil_div(hidden, 128);
    Args args{};
    args.row_pitch = ceil_div(hidden * E::kBytes, 128) * 128, args.scale_pitch = ceil_div(blocks, 8) * 8;
    args.rows = 256, args.row_scales = args.rows + kWorld * kTokens * args.row_pitch;
    args.arrived = args.row_scales + kWorld * kTokens * args.scale_pitch * 4;
    args.pushes = (args.arrived + 256) / 256 * 256;
    args.hidden = hidden, args.max_tokens = kTokens, args.max_copies = 2;
    args.rank = 1, args.world = kWorld, args.slots_here = kSlots;
    Block memory[kWorld] = {Block(args.pushes + 4096), Block(args.pushes + 4096)};
    const u64 bases[kWorld] = {memory[0].base(), memory[1].base()};
    args.bases = bases, args.own = bases[1];
    for (u64 base : bases) std::memset(reinterpret_cast<void*>(base + args.arrived), 0, kWorld * kSlots * 4);

    // Behind a row stand numbers that must not be read.
    const int ld = ceil_div(hidden, 16) * 16 + 16;
    Block tokens(kTokens * ld * 2);
    auto* x = reinterpret_cast<u8*>(tokens.base());
    for (int t = 0; t < kTokens; ++t)
        for (int c = 0; c < ld; ++c) {
            const float v = c < hidden ? drawn(t, c) : std::numeric_limits<float>::quiet_NaN();
            const u16 word = to_bf16(v);
            if (kQuantised)
                x[t * ld + c] = to_e4m3(v);
            else
                std::memcpy(x + (t * ld + c) * 2, &word, 2);
        }
    std::vector<float> scales(16 * 20);  // a block's together, 16 tokens apart
    for (auto& s : scales) s = std::rand() / static_cast<float>(RAND_MAX);
    args.x = x, args.x_ld = ld, args.x_scales = scales.data(), args.x_scales_ld = 1, args.x_scales_step = 16;

    auto* list = reinterpret_cast<Push*>(bases[1] + args.pushes);
    for (u32 i = 0; i < 6; ++i)
        list[i] = Push{static_cast<u32>(std::rand() % kTokens), i, i * 5 % 6 / kSlots, i * 5 % 6 % kSlots};
    list[1].token = 3, list[2].token = 4;
    u32 next = 1;                           // somebody has taken the first
    const bool math = n == 1, tile = true;  // which counts for math warps that have sent the first rows
    run_warp([&](u32 lane) {
        Context<C> x{args, lane, kTokens};
        x.next_push = &next, x.first_tile_there = tile;
        Pusher<C>{x}.run(1 + n, math);
    });
    expect(next >= u32(1 + n), true, "rows that are taken", hidden, 0, 0);

    for (int i = 1; i < 1 + n; ++i) {
        const Push& p = list[i];
        const u64 owner = bases[p.owner];
        const u8* row = reinterpret_cast<u8*>(owner + args.rows) + (kTokens + p.row) * args.row_pitch;
        const float* sent = reinterpret_cast<float*>(owner + args.row_scales) + (kTokens + p.row) * args.scale_pitch;
        const u8* from = x + p.token * ld * (kQuantised ? 1 : 2);
        auto word = [&](const u8* words, int c) { return words[2 * c] | words[2 * c + 1] << 8; };
        auto value = [&](int c) { return from_bf16(word(from, c)); };
        for (int c = 0; c < args.row_pitch / E::kBytes; ++c) {
            if constexpr (E::kBytes == 2) {
                expect(word(row, c), c < hidden ? word(from, c) : 0, what, hidden, i, c);
                continue;
            }
            const int b = kRowScaled ? 0 : c / 128;
            const int begin = b * 128, end = kRowScaled ? hidden : std::min(hidden, begin + 128);
            const float scale = kQuantised ? scales[p.token + 16 * b] : scale_of(amax_of(value, begin, end));
            expect(sent[b], scale, what, hidden, i, b);
            const u32 code = c >= hidden ? 0 : kQuantised ? from[c] : code_of(value(c), scale);
            expect<u32>(row[c], code, what, hidden, i, c);
        }
        const auto* arrived = reinterpret_cast<u32*>(owner + args.arrived) + kSlots + p.slot;
        expect<u32>(*arrived, 1, "rows that are counted", hidden, i, 0);
    }
    return n;
}

}  // namespace

int main() {
    int cast = 0, pushed = 0;
    for (int inter : {8, 136, 264, 1032, 3400})
        for (int rows : {1, 16, 77}) cast += cast_rows(inter, rows);
    for (int hidden : {8, 136, 520, 2048})
        for (int n : {1, 4}) {
            pushed += push<PlainPiece, BF16, false, false>("bf16", hidden, n);
            pushed += push<BlockCastPiece, E4M3, false, false>("cast by block", hidden, n);
            pushed += push<RowCastPiece, E4M3, true, false>("cast by row", hidden, n);
            pushed += push<QuantisedPiece<false>, E4M3, false, true>("quantised by block", hidden, n);
            pushed += push<QuantisedPiece<true>, E4M3, true, true>("quantised by row", hidden, n);
        }
    std::printf("%d rows cast, %d pushed\n", cast, pushed);
}
