// weights.cu: the kernels before and after the rows, one block each. Next: weights.cuh, which says what they compute.
#include "weights.cuh"

namespace distil_fast::cuda {
namespace {

constexpr int weigh_threads = 512;

DISTIL_FAST_DEVICE void put_fault(double* fault, FaultKind kind, int64_t row, double value) {
  fault[0] = static_cast<double>(kind), fault[1] = static_cast<double>(row), fault[2] = value;
}

// What a row of a term counts, or the fault of the value that says so. Orders faults as the CPU meets them.
class RowCheck {
 public:
  DISTIL_FAST_DEVICE RowCheck(const WeighArgs& a, bool soft, bool hard) : a_(a), soft_(soft), hard_(hard) {}

  DISTIL_FAST_DEVICE double mask(int64_t row) const {
    if (!soft_) return 0.0;
    if (!a_.mask) return 1.0;
    return a_.mask_is_bool ? static_cast<const unsigned char*>(a_.mask)[row] != 0
                           : static_cast<const float*>(a_.mask)[row];
  }
  DISTIL_FAST_DEVICE double temperature(int64_t row) const {
    return a_.temperatures ? a_.temperatures[row] : a_.temperature.value();
  }
  DISTIL_FAST_DEVICE bool labelled(int64_t row) const { return hard_ && a_.labels[row] != a_.ignore_index; }
  DISTIL_FAST_DEVICE bool bad_mask(int64_t row) const {
    const double weight = mask(row);
    return !(weight >= 0.0) || weight > 3.4028234664e38;
  }
  DISTIL_FAST_DEVICE bool bad_label(int64_t row) const {
    return labelled(row) && (a_.labels[row] < 0 || a_.labels[row] >= a_.cols);
  }
  DISTIL_FAST_DEVICE bool bad_class_weight(int64_t row) const {
    if (!a_.class_weights || !labelled(row) || bad_label(row)) return false;
    const float weight = a_.class_weights[a_.labels[row]];
    return !(weight >= 0.0f) || weight > 3.4028234664e38f;
  }
  // What a row counts in the hard term.
  DISTIL_FAST_DEVICE double weight(int64_t row) const {
    if (!labelled(row) || bad_label(row) || bad_class_weight(row)) return 0.0;
    return a_.class_weights ? a_.class_weights[a_.labels[row]] : 1.0;
  }
  DISTIL_FAST_DEVICE bool bad_temperature(int64_t row) const {
    const double t = temperature(row);
    return mask(row) != 0.0 && !(t >= 1e-15 && t <= 1e15);
  }
  DISTIL_FAST_DEVICE FaultKind fault(int64_t row) const {
    if (bad_mask(row)) return FaultKind::mask;
    if (bad_label(row)) return FaultKind::label;
    if (bad_class_weight(row)) return FaultKind::class_weight;
    return bad_temperature(row) ? FaultKind::temperature : FaultKind::nothing;
  }
  // mask before labels before their classes' weights before temperatures, then by row
  DISTIL_FAST_DEVICE int64_t order(FaultKind kind, int64_t row) const {
    const int64_t rank = kind == FaultKind::mask           ? 0
                         : kind == FaultKind::label        ? 1
                         : kind == FaultKind::class_weight ? 2
                                                           : 3;
    return kind == FaultKind::nothing ? INT64_MAX : rank * a_.rows + row;
  }
  DISTIL_FAST_DEVICE void report(int64_t order) const {
    if (order == INT64_MAX) return put(FaultKind::nothing, -1, 0.0);
    const int64_t row = order % a_.rows, rank = order / a_.rows;
    if (rank == 0) return put(FaultKind::mask, row, mask(row));
    if (rank == 1) return put(FaultKind::label, row, static_cast<double>(a_.labels[row]));
    if (rank == 3) return put(FaultKind::temperature, row, temperature(row));
    put(FaultKind::class_weight, a_.labels[row], a_.class_weights[a_.labels[row]]);
  }

 private:
  DISTIL_FAST_DEVICE void put(FaultKind kind, int64_t row, double value) const {
    put_fault(a_.fault, kind, row, value);
  }

  const WeighArgs& a_;
  const bool soft_, hard_;
};

DISTIL_FAST_DEVICE double scale_of(bool mean, double given, double counted) {
  const double count = given == -1.0 ? counted : given;
  return !mean ? 1.0 : count > 0.0 ? 1.0 / count : count == count ? 0.0 : count;
}

// As cpu/shares.h has it: a power of two 64 times below the largest weight, which makes applying it exact.
DISTIL_FAST_DEVICE float unit_of(double largest) {
  if (!(largest > 0.0) || largest > 3.4028234664e38) return 1.0f;
  return static_cast<float>(::exp2(::ceil(::log2(largest)) - 6.0));
}

DISTIL_FAST_KERNEL(weigh_threads, 1) weigh_kernel(DISTIL_FAST_ARGS(WeighArgs) a) {
  Team<double> team(reinterpret_cast<double*>(hw::shared()));
  Team<int64_t> order(reinterpret_cast<int64_t*>(hw::shared()) + Team<double>::values);
  const double of_soft = a.has_soft ? a.soft_weight.value() : 0.0, of_hard = a.has_hard ? a.hard_weight.value() : 0.0;
  const RowCheck check(a, of_soft != 0.0, of_hard != 0.0);

  double counted[2] = {0.0, 0.0};
  int64_t first_fault[1] = {INT64_MAX};
  for (int64_t row = hw::thread(); row < a.rows; row += hw::threads()) {
    const FaultKind fault = check.fault(row);
    first_fault[0] = Smallest::of(first_fault[0], check.order(fault, row));
    if (fault != FaultKind::mask) counted[0] += check.mask(row);
    counted[1] += check.weight(row);
  }
  team.combine<Sum>(counted);
  order.combine<Smallest>(first_fault);

  const double soft_scale = of_soft != 0.0 ? scale_of(a.mean, a.soft_count.value(), counted[0]) : 0.0;
  const double hard_scale = of_hard != 0.0 ? scale_of(a.mean, a.hard_count.value(), counted[1]) : 0.0;
  double largest[1] = {0.0};
  for (int64_t row = hw::thread(); row < a.rows; row += hw::threads()) {
    const FaultKind fault = check.fault(row);
    const double t = check.temperature(row), upstream = a.upstream ? a.upstream[row] : 1.0;
    double soft = fault == FaultKind::nothing && soft_scale != 0.0 ? check.mask(row) * soft_scale : 0.0;
    if (soft != 0.0 && a.t_squared) soft *= t * t;
    const double counts = fault == FaultKind::nothing ? check.weight(row) : 0.0;
    const double hard = counts == 0.0 ? 0.0 : counts * hard_scale;
    const double in_soft = soft == 0.0 ? 0.0 : soft * of_soft * upstream;
    const double in_hard = hard == 0.0 ? 0.0 : hard * of_hard * upstream;
    a.out.soft[row] = static_cast<float>(in_soft);
    a.out.hard[row] = static_cast<float>(in_hard);
    a.out.soft_share[row] =
        fault == FaultKind::mask || fault == FaultKind::temperature ? not_a_number : static_cast<float>(soft);
    a.out.hard_share[row] =
        fault == FaultKind::label || fault == FaultKind::class_weight ? not_a_number : static_cast<float>(hard);
    a.out.temperature[row] = static_cast<float>(t);
    a.out.fault[row] = 0.0f;
    const double size = __builtin_fabs(in_soft / (a.norms ? a.norms[row] : t)) + __builtin_fabs(in_hard);
    largest[0] = Largest::of(largest[0], in_soft == 0.0 ? __builtin_fabs(in_hard) : size);
  }
  team.combine<Largest>(largest);
  if (hw::thread() != 0) return;
  *a.out.soft_weight = static_cast<float>(of_soft);
  *a.out.hard_weight = static_cast<float>(of_hard);
  if (a.unit) *a.unit = a.needs_unit && !a.upstream ? unit_of(largest[0] * a.slope) : 1.0f;
  check.report(first_fault[0]);
}

DISTIL_FAST_KERNEL(weigh_threads, 1) total_kernel(DISTIL_FAST_ARGS(TotalArgs) a) {
  Team<double> team(reinterpret_cast<double*>(hw::shared()));
  Team<int64_t> order(reinterpret_cast<int64_t*>(hw::shared()) + Team<double>::values);
  double sums[2] = {0.0, 0.0};
  int64_t first_fault[1] = {INT64_MAX};
  for (int64_t row = hw::thread(); row < a.rows; row += hw::threads()) {
    if (a.loss) sums[0] += a.weights.soft_value[row], sums[1] += a.weights.hard_value[row];
    if (a.fault && a.weights.fault[row] != 0.0f) first_fault[0] = Smallest::of(first_fault[0], row);
  }
  team.combine<Sum>(sums);
  order.combine<Smallest>(first_fault);
  if (hw::thread() != 0) return;
  const int64_t row = first_fault[0];
  if (row != INT64_MAX && a.fault[0] == 0.0)
    put_fault(a.fault, static_cast<FaultKind>(a.weights.fault[row]), row, a.weights.fault_value[row]);
  if (!a.loss) return;
  *a.loss = static_cast<float>(weighted(*a.weights.soft_weight, sums[0]) + weighted(*a.weights.hard_weight, sums[1]));
  *a.soft = static_cast<float>(sums[0]);
  if (a.hard) *a.hard = static_cast<float>(sums[1]);
}

// For kernels with a thread per row, as far as one block has threads.
template <class Args>
const char* launch_one_block(void (*kernel)(Args), void* stream, const Args& args) {
  constexpr int bytes = (Team<double>::values + Team<int64_t>::values) * 8;
  const int threads = static_cast<int>(smaller(over(args.rows, 32) * 32, weigh_threads));
  return hw::Kernel<Args>(kernel, {1, threads, 1, bytes, stream}).launch(args);
}

}  // namespace

const char* launch_weights(const WeighArgs& args, void* stream) {
  return launch_one_block<WeighArgs>(weigh_kernel, stream, args);
}
const char* launch_total(const TotalArgs& args, void* stream) {
  return launch_one_block<TotalArgs>(total_kernel, stream, args);
}

}  // namespace distil_fast::cuda
