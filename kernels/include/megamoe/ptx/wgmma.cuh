// WGMMA m64nNkK, D (fp32 registers) = A (shared) x B (shared) + scale_d * D, for e4m3 (K = 32) and bf16 (K = 16).
// Thread t of the warpgroup holds, for j in 0 .. N/8-1, D[16*(t/32) + (t%32)/4 + 8*h][8*j + 2*(t%4) + c] in d[4*j + 2*h
// + c]. kTransA, kTransB: 1 if that operand is MN-major in shared memory (bf16 only), 0 if it is K-major.
#pragma once
#include "megamoe/common/types.cuh"

namespace megamoe::ptx {

MM_DEVICE void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
MM_DEVICE void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int Pending>
MM_DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

// Keeps the compiler from moving reads or writes of an accumulator register across this point.
MM_DEVICE void pin_register(float& r) {
    asm volatile("" : "+f"(r)::"memory");
}

// x * y (and +0 for -0). ptxas lets another warp go first between FFMAs that follow an MMA, not between FMULs: those
// keep a factor in the operand cache (docs/performance.md).
MM_DEVICE float product_by_fma(float x, float y) {
    float r;
    asm("fma.rn.f32 %0, %1, %2, 0f00000000;" : "=f"(r) : "f"(x), "f"(y));
    return r;
}

// Two zeroes in one aligned 64-bit pair of registers.
MM_DEVICE void zero_pair(float& x, float& y) {
    asm volatile("{\n .reg .b64 z;\n mov.b64 z, 0;\n mov.b64 {%0, %1}, z;\n}\n" : "=f"(x), "=f"(y));
}

template <class Elem, int N>
struct Wgmma;

// Operand lists, four registers for each 8 columns.
#define MM_R0 "%0, %1, %2, %3"
#define MM_R1 "%4, %5, %6, %7"
#define MM_R2 "%8, %9, %10, %11"
#define MM_R3 "%12, %13, %14, %15"
#define MM_R4 "%16, %17, %18, %19"
#define MM_R5 "%20, %21, %22, %23"
#define MM_R6 "%24, %25, %26, %27"
#define MM_R7 "%28, %29, %30, %31"
#define MM_R8 "%32, %33, %34, %35"
#define MM_R9 "%36, %37, %38, %39"
#define MM_R10 "%40, %41, %42, %43"
#define MM_R11 "%44, %45, %46, %47"
#define MM_R12 "%48, %49, %50, %51"
#define MM_R13 "%52, %53, %54, %55"
#define MM_R14 "%56, %57, %58, %59"
#define MM_R15 "%60, %61, %62, %63"
#define MM_R16 "%64, %65, %66, %67"
#define MM_R17 "%68, %69, %70, %71"
#define MM_R18 "%72, %73, %74, %75"
#define MM_R19 "%76, %77, %78, %79"
#define MM_R20 "%80, %81, %82, %83"
#define MM_R21 "%84, %85, %86, %87"
#define MM_R22 "%88, %89, %90, %91"
#define MM_R23 "%92, %93, %94, %95"
#define MM_R24 "%96, %97, %98, %99"
#define MM_R25 "%100, %101, %102, %103"
#define MM_R26 "%104, %105, %106, %107"
#define MM_R27 "%108, %109, %110, %111"
#define MM_R28 "%112, %113, %114, %115"
#define MM_R29 "%116, %117, %118, %119"
#define MM_R30 "%120, %121, %122, %123"
#define MM_R31 "%124, %125, %126, %127"
#define MM_L1 MM_R0
#define MM_L2 MM_L1 ", " MM_R1
#define MM_L3 MM_L2 ", " MM_R2
#define MM_L4 MM_L3 ", " MM_R3
#define MM_L5 MM_L4 ", " MM_R4
#define MM_L6 MM_L5 ", " MM_R5
#define MM_L7 MM_L6 ", " MM_R6
#define MM_L8 MM_L7 ", " MM_R7
#define MM_L9 MM_L8 ", " MM_R8
#define MM_L10 MM_L9 ", " MM_R9
#define MM_L11 MM_L10 ", " MM_R10
#define MM_L12 MM_L11 ", " MM_R11
#define MM_L13 MM_L12 ", " MM_R12
#define MM_L14 MM_L13 ", " MM_R13
#define MM_L15 MM_L14 ", " MM_R14
#define MM_L16 MM_L15 ", " MM_R15
#define MM_L17 MM_L16 ", " MM_R16
#define MM_L18 MM_L17 ", " MM_R17
#define MM_L19 MM_L18 ", " MM_R18
#define MM_L20 MM_L19 ", " MM_R19
#define MM_L21 MM_L20 ", " MM_R20
#define MM_L22 MM_L21 ", " MM_R21
#define MM_L23 MM_L22 ", " MM_R22
#define MM_L24 MM_L23 ", " MM_R23
#define MM_L25 MM_L24 ", " MM_R24
#define MM_L26 MM_L25 ", " MM_R25
#define MM_L27 MM_L26 ", " MM_R26
#define MM_L28 MM_L27 ", " MM_R27
#define MM_L29 MM_L28 ", " MM_R28
#define MM_L30 MM_L29 ", " MM_R29
#define MM_L31 MM_L30 ", " MM_R30
#define MM_L32 MM_L31 ", " MM_R31
#define MM_O1(d) "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define MM_O2(d) MM_O1(d), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define MM_O3(d) MM_O2(d), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define MM_O4(d) MM_O3(d), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define MM_O5(d) MM_O4(d), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19])
#define MM_O6(d) MM_O5(d), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define MM_O7(d) MM_O6(d), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27])
#define MM_O8(d) MM_O7(d), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define MM_O9(d) MM_O8(d), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35])
#define MM_O10(d) MM_O9(d), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define MM_O11(d) MM_O10(d), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43])
#define MM_O12(d) MM_O11(d), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define MM_O13(d) MM_O12(d), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51])
#define MM_O14(d) MM_O13(d), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define MM_O15(d) MM_O14(d), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59])
#define MM_O16(d) MM_O15(d), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define MM_O17(d) MM_O16(d), "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67])
#define MM_O18(d) MM_O17(d), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71])
#define MM_O19(d) MM_O18(d), "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75])
#define MM_O20(d) MM_O19(d), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79])
#define MM_O21(d) MM_O20(d), "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83])
#define MM_O22(d) MM_O21(d), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87])
#define MM_O23(d) MM_O22(d), "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91])
#define MM_O24(d) MM_O23(d), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define MM_O25(d) MM_O24(d), "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99])
#define MM_O26(d) MM_O25(d), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103])
#define MM_O27(d) MM_O26(d), "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107])
#define MM_O28(d) MM_O27(d), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111])
#define MM_O29(d) MM_O28(d), "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115])
#define MM_O30(d) MM_O29(d), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119])
#define MM_O31(d) MM_O30(d), "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123])
#define MM_O32(d) MM_O31(d), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])

// `tail` ends the instruction: the scale and transpose immediates of its type; further operands follow.
#define MM_WGMMA(Elem, N, G, A, B, P, shape, tail, allowed, ...)                                              \
    template <>                                                                                               \
    struct Wgmma<Elem, N> {                                                                                   \
        template <int kTransA = 0, int kTransB = 0>                                                           \
        static MM_DEVICE void run(float (&d)[N / 2], u64 desc_a, u64 desc_b, u32 scale_d) {                   \
            static_assert(allowed, "8-bit operands are K-major");                                             \
            asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, " P ", 0;\n wgmma.mma_async.sync.aligned." shape \
                         " {" MM_L##G "}, " A ", " B ", p, " tail ";\n}\n"                                    \
                         : MM_O##G(d)                                                                         \
                         : "l"(desc_a), "l"(desc_b), "r"(scale_d)__VA_ARGS__);                                \
        }                                                                                                     \
    };
#define MM_WGMMA_BOTH(N, G, A, B, P, TA, TB)                                                                \
    MM_WGMMA(E4M3, N, G, A, B, P, "m64n" #N "k32.f32.e4m3.e4m3", "1, 1", kTransA == 0 && kTransB == 0)      \
    MM_WGMMA(BF16, N, G, A, B, P, "m64n" #N "k16.f32.bf16.bf16", "1, 1, " TA ", " TB, true, , "n"(kTransA), \
             "n"(kTransB))

MM_WGMMA_BOTH(8, 1, "%4", "%5", "%6", "%7", "%8")
MM_WGMMA_BOTH(16, 2, "%8", "%9", "%10", "%11", "%12")
MM_WGMMA_BOTH(24, 3, "%12", "%13", "%14", "%15", "%16")
MM_WGMMA_BOTH(32, 4, "%16", "%17", "%18", "%19", "%20")
MM_WGMMA_BOTH(40, 5, "%20", "%21", "%22", "%23", "%24")
MM_WGMMA_BOTH(48, 6, "%24", "%25", "%26", "%27", "%28")
MM_WGMMA_BOTH(56, 7, "%28", "%29", "%30", "%31", "%32")
MM_WGMMA_BOTH(64, 8, "%32", "%33", "%34", "%35", "%36")
MM_WGMMA_BOTH(72, 9, "%36", "%37", "%38", "%39", "%40")
MM_WGMMA_BOTH(80, 10, "%40", "%41", "%42", "%43", "%44")
MM_WGMMA_BOTH(88, 11, "%44", "%45", "%46", "%47", "%48")
MM_WGMMA_BOTH(96, 12, "%48", "%49", "%50", "%51", "%52")
MM_WGMMA_BOTH(104, 13, "%52", "%53", "%54", "%55", "%56")
MM_WGMMA_BOTH(112, 14, "%56", "%57", "%58", "%59", "%60")
MM_WGMMA_BOTH(120, 15, "%60", "%61", "%62", "%63", "%64")
MM_WGMMA_BOTH(128, 16, "%64", "%65", "%66", "%67", "%68")
MM_WGMMA_BOTH(136, 17, "%68", "%69", "%70", "%71", "%72")
MM_WGMMA_BOTH(144, 18, "%72", "%73", "%74", "%75", "%76")
MM_WGMMA_BOTH(152, 19, "%76", "%77", "%78", "%79", "%80")
MM_WGMMA_BOTH(160, 20, "%80", "%81", "%82", "%83", "%84")
MM_WGMMA_BOTH(168, 21, "%84", "%85", "%86", "%87", "%88")
MM_WGMMA_BOTH(176, 22, "%88", "%89", "%90", "%91", "%92")
MM_WGMMA_BOTH(184, 23, "%92", "%93", "%94", "%95", "%96")
MM_WGMMA_BOTH(192, 24, "%96", "%97", "%98", "%99", "%100")
MM_WGMMA_BOTH(200, 25, "%100", "%101", "%102", "%103", "%104")
MM_WGMMA_BOTH(208, 26, "%104", "%105", "%106", "%107", "%108")
MM_WGMMA_BOTH(216, 27, "%108", "%109", "%110", "%111", "%112")
MM_WGMMA_BOTH(224, 28, "%112", "%113", "%114", "%115", "%116")
MM_WGMMA_BOTH(232, 29, "%116", "%117", "%118", "%119", "%120")
MM_WGMMA_BOTH(240, 30, "%120", "%121", "%122", "%123", "%124")
MM_WGMMA_BOTH(248, 31, "%124", "%125", "%126", "%127", "%128")
MM_WGMMA_BOTH(256, 32, "%128", "%129", "%130", "%131", "%132")

#undef MM_WGMMA_BOTH
#undef MM_WGMMA

}  // namespace megamoe::ptx
