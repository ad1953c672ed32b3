// Which instruction set runs: every ISA's table is linked in, one is chosen at import, and asked for what is not a step of a plan.
#define _GNU_SOURCE
#include "engine.h"
#if defined __linux__ && defined __x86_64__
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined __linux__ && defined __aarch64__
#include <sys/auxv.h>
#include <asm/hwcap.h>
#endif

// ISA_LIST(X) is given by build.py: X(scalar) X(avx2) ... in rising order of preference
#define X(isa) extern const kernel_table kernels_##isa;
ISA_LIST(X)
#undef X
static const kernel_table *const tables[] = {
#define X(isa) &kernels_##isa,
    ISA_LIST(X)
#undef X
};
const kernel_table *kernels = &kernels_scalar;
int fetch_streams, slow_bf16, fetch_stores = 1, stream_stores;

// AMX with bf16: CPUID says what the processor has; Linux gives a process the tile registers when it asks for them.
static int matrix_unit(void) {
#if defined __x86_64__ && defined __linux__
    enum { AMX_BF16 = 1 << 22, AMX_TILE = 1 << 24, ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & AMX_BF16) && (d & AMX_TILE)
           && !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
#else
    return 0;
#endif
}

// __builtin_cpu_supports checks CPUID and, for AVX and later, that the operating system saves the registers (XGETBV).
static int supported(const char *isa) {
    if (!strcmp(isa, "scalar")) return 1;
#if defined __x86_64__
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (!strcmp(isa, "avx2")) return avx2;
    int vnni = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")
               && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
    if (!strcmp(isa, "avxvnni")) return EVEX_AVXVNNI ? vnni : avx2 && __builtin_cpu_supports("avxvnni");
    if (!strcmp(isa, "avx512")) return vnni;
    int bf16 = vnni && __builtin_cpu_supports("avx512bf16");
    if (!strcmp(isa, "avx512bf16")) return bf16;
    if (!strcmp(isa, "amx")) return bf16 && matrix_unit();
#elif defined __aarch64__
#ifdef __linux__
    unsigned long wanted = HWCAP_ASIMDDP | HWCAP_FPHP | HWCAP_ASIMDHP, has = getauxval(AT_HWCAP);      // a Cortex-A72 has none of them
    if (!strcmp(isa, "neon")) return (has & wanted) == wanted;
#else
    if (!strcmp(isa, "neon")) return 1;            // every 64-bit Apple processor since the M1
#endif
#endif
    return 0;
}

int pyg_isa_count(void) { return sizeof tables / sizeof *tables; }
const char *pyg_isa_name(int isa) { return tables[isa]->isa; }
int pyg_isa_supported(int isa) { return supported(tables[isa]->isa); }
void pyg_isa_select(int isa) {
    kernels = tables[isa];
#if defined __x86_64__
    slow_bf16 = fetch_stores = __builtin_cpu_is("intel") != 0;
    stream_stores = __builtin_cpu_is("amd") != 0;
    fetch_streams = slow_bf16 || !__builtin_cpu_supports("avx512f");
#endif
}

static const char *const op_names[] = {
#define OP(name) #name,
    PYG_OPS(OP)
#undef OP
};
int pyg_op_count(void) { return N_OPS; }
const char *pyg_op_name(int op) { return op_names[op]; }
const char *pyg_compiler(void) {
#if defined __clang__
    return "clang " __clang_version__;
#else
    return "gcc " __VERSION__;
#endif
}

int     pyg_act_format(int type, int packed, int exact, int fixed) { return kernels->act_format(type, packed, exact, fixed); }
int     pyg_attends_in_bf16(int64_t tokens, int fixed) { return kernels->attends_in_bf16(tokens, fixed); }
int64_t pyg_act_bytes(int format, int64_t k, int64_t cols) { return kernels->act_bytes(format, k, cols); }
int64_t pyg_pack_bytes(int type, int64_t rows, int64_t k) { return kernels->pack_bytes(type, rows, k); }

int pyg_dot(int type, int64_t n, const void *weights, const void *activations, float *result) {
    if (!kernels->dot[type]) return 1;
    *result = kernels->dot[type](n, weights, activations);
    return 0;
}
