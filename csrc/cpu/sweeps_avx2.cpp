// sweeps_avx2.cpp: the sweeps compiled for AVX2, FMA and F16C; CMake gives this file its -m flags. Next:
// sweeps_body.h.
#define DISTIL_FAST_VEC "vec_avx2.h"
#define DISTIL_FAST_TABLE table_avx2
#include "sweeps_body.h"
