// sweeps_body.h: all sweeps for the instruction set of the including file, behind one table. Everything here
// but the table has internal linkage: the linker could hand any shared copy of a function to a machine that
// lacks the instructions (a test counts such symbols). Next: sweeps.h.
#include <immintrin.h>
#include <cmath>
#include <cstdint>
#include <limits>
#include "../pairs.h"
#include "table.h"

namespace distil_fast {
namespace {
#include "bits.h"
#include DISTIL_FAST_VEC
#include "math.h"
#include "sweeps.h"
#include "prepare.h"
#include "pair.h"
#include "sharded.h"
#include "softmax.h"
#include "topk.h"
#include "make_table.h"
}  // namespace

extern const Table<float> DISTIL_FAST_TABLE;
const Table<float> DISTIL_FAST_TABLE = make_table<Vec, float, Half, BFloat16>();

}  // namespace distil_fast
