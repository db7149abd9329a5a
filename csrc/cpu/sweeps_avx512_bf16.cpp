// sweeps_avx512_bf16.cpp: the sweeps compiled for AVX-512 with its bfloat16 conversions; CMake gives this
// file its -m flags. Next: sweeps_body.h.
#define DISTIL_FAST_VEC "vec_avx512.h"
#define DISTIL_FAST_TABLE table_avx512_bf16
#include "sweeps_body.h"
