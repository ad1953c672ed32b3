// One translation unit, compiled once per instruction set with -DISA=<name> -DISA_<name>; it contributes one kernel_table.
#include "engine.h"
#include "simd/simd.h"
#include "kernels/unpack.h"
#include "kernels/dequantize.h"
#include "kernels/quantize.h"
#include "kernels/dot.h"
#include "kernels/rows.h"
#include "kernels/norm.h"
#include "kernels/unary.h"
#include "kernels/act.h"
#include "kernels/pack.h"
#include "kernels/tile.h"
#include "kernels/squares.h"
#include "kernels/spread.h"
#include "kernels/matmul.h"
#include "kernels/experts.h"
#include "kernels/rope.h"
#include "kernels/attention.h"
#include "kernels/moe.h"
#include "kernels/peak.h"

#define CAT_(a, b) a##_##b
#define CAT(a, b) CAT_(a, b)
#define STR_(x) #x
#define STR(x) STR_(x)
const kernel_table CAT(kernels, ISA) = {
    .isa = STR(ISA),
    .op = {
#define OP(name) [OP_##name] = op_##name,
        PYG_OPS(OP)
#undef OP
    },
    .scratch = {[OP_mul_mat] = scratch_mul_mat, [OP_glu_mat] = scratch_mul_mat, [OP_mul_mat_id] = scratch_mul_mat_id, [OP_glu_mat_id] = scratch_mul_mat_id,
                [OP_attention] = scratch_attention, [OP_attention_step] = scratch_attention_step, [OP_moe_route] = scratch_moe_route, [OP_peak] = scratch_peak},
    .dequantize = DEQUANTIZE_TABLE,
    .quantize = QUANTIZE_TABLE,
    .encode = ENCODE_TABLE,
    .formula = FORMULA_TABLE,
    .finite = finite_floats,
    .quantize_finite = FINITE_TABLE,
    .dot = DOT_TABLE,
    .stream = stream_lines,
    .row_bytes = row_bytes,
    .act_format = act_format,
    .attends_in_bf16 = attends_in_bf16,
    .act_bytes = act_bytes,
    .pack_bytes = pack_bytes,
};
