// sweeps_portable.cpp: the sweeps compiled for any processor, and for doubles, which run through here
// everywhere. Next: vec_portable.h, the vector of one that they are compiled for.
#include <cmath>
#include <cstdint>
#include <limits>
#include "../pairs.h"
#include "table.h"

namespace distil_fast {
namespace {
#include "bits.h"
#include "vec_portable.h"
#include "math.h"
#include "math_double.h"
#include "sweeps.h"
#include "prepare.h"
#include "pair.h"
#include "sharded.h"
#include "softmax.h"
#include "topk.h"
#include "make_table.h"
}  // namespace

extern const Table<float> table_portable;
extern const Table<double> table_double;
const Table<float> table_portable = make_table<Scalar<float>, float, Half, BFloat16>();
const Table<double> table_double = make_table<Scalar<double>, double>();

}  // namespace distil_fast
