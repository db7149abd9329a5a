// sweeps_avx512_bf16.cpp: the sweeps compiled for AVX-512 with its bfloat16 conversions. CMake gives this
// file its -m flags, so everything here has internal linkage but one table: the linker could hand any shared
// copy of a function to a machine without them (a test counts).
#include <immintrin.h>
#include <cmath>
#include <cstdint>
#include <limits>
#include "table.h"

namespace distil_fast {
namespace {
#include "bits.h"
#include "vec_avx512.h"
#include "math.h"
#include "sweeps.h"
#include "hidden.h"
#include "softmax.h"
#include "make_table.h"
}  // namespace

extern const Table<float> table_avx512_bf16;
const Table<float> table_avx512_bf16 = make_table<Vec, float, Half, BFloat16>();

}  // namespace distil_fast
