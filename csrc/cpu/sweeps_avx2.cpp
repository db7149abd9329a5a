// sweeps_avx2.cpp: the sweeps compiled for AVX2. CMake gives this file its -m flags, so everything here has
// internal linkage but one table: the linker could hand any shared copy of a function to a machine without
// AVX2 (a test counts).
#include <immintrin.h>
#include <cmath>
#include <cstdint>
#include <limits>
#include "table.h"

namespace distil_fast {
namespace {
#include "bits.h"
#include "vec_avx2.h"
#include "math.h"
#include "sweeps.h"
#include "hidden.h"
#include "softmax.h"
#include "make_table.h"
}  // namespace

extern const Table<float> table_avx2;
const Table<float> table_avx2 = make_table<Vec, float, Half, BFloat16>();

}  // namespace distil_fast
