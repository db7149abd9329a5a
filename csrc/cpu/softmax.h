// softmax.h: the sweeps of softmax and log_softmax over one block of columns, on any Vec, beyond those of
// sweeps.h. They know one block and its scalars: nothing of rows or threads. Next: softmax.cpp, which
// conducts them.

// out = (logits - shift) / temperature - log_z
template <class V, class S>
void log_probabilities(void* out, const void* logits, int64_t n, double shift, double inverse_t, double log_z) {
  S* to = static_cast<S*>(out);
  const S* s = static_cast<const S*>(logits);
  const V top(shift), scale(inverse_t), lse(log_z);
  const int64_t whole = n - n % V::width;
  for (int64_t j = 0; j < whole; j += V::width) store(to + j, fms(load(s + j) - top, scale, lse));
  if (whole < n) store(to + whole, fms(load(s + whole, n - whole, 0.0) - top, scale, lse), n - whole);
}

// Sum of grad_out (log_softmax), or of grad_out times out (softmax).
template <class V, class S, bool logarithm>
double upstream_sum(const void* out, const void* grad_out, int64_t n) {
  const S* y = static_cast<const S*>(out);
  const S* g = static_cast<const S*>(grad_out);
  const int64_t whole = n - n % V::width;
  V total(0);
  auto step = [&](V yj, V gj) { total = logarithm ? total + gj : fma(gj, yj, total); };
  for (int64_t j = 0; j < whole; j += V::width) step(load(y + j), load(g + j));
  if (whole < n) step(load(y + whole, n - whole, 0.0), load(g + whole, n - whole, 0.0));
  return sum(total);
}

// softmax: grad = y (g - total) / T; log_softmax: grad = (g - exp(y) total) / T.
template <class V, class S, bool logarithm>
void softmax_gradient(void* grad, const void* out, const void* grad_out, int64_t n, double total, double inverse_t) {
  S* to = static_cast<S*>(grad);
  const S* y = static_cast<const S*>(out);
  const S* g = static_cast<const S*>(grad_out);
  const Exponential<V> at_one(1.0);
  const V all(total), scale(inverse_t);
  auto value = [&](V yj, V gj) {
    if constexpr (logarithm) return (gj - at_one(yj) * all) * scale;
    return yj * (gj - all) * scale;
  };
  const int64_t whole = n - n % V::width;
  for (int64_t j = 0; j < whole; j += V::width) store(to + j, value(load(y + j), load(g + j)));
  if (whole < n) store(to + whole, value(load(y + whole, n - whole, 0.0), load(g + whole, n - whole, 0.0)), n - whole);
}

template <class V, class S, int D>
constexpr void fill_softmax(SoftmaxSweeps<D>& table, int s) {
  table.log_probabilities[s] = log_probabilities<V, S>;
  table.upstream_sum[s][0] = upstream_sum<V, S, false>;
  table.upstream_sum[s][1] = upstream_sum<V, S, true>;
  table.gradient[s][0] = softmax_gradient<V, S, false>;
  table.gradient[s][1] = softmax_gradient<V, S, true>;
}
