// sweeps.h: the three sweeps over one block of columns that the row algorithm is made of, on any Vec:
//   exponentiate  reads the logits, keeps their exponentials;   diverge  turns those into f and g;   gradient
//   writes.
// They know one block and its scalars: nothing of rows, weights, labels or threads. Each knows one axis:
// dtypes live in the first and the last, divergences in the middle one. Next: row_loss.h, which conducts
// them.

// A sum in two levels: of thousands of terms in one float, the small ones beside a large one would lose their
// digits.
template <class V>
struct Total {
  V part{0}, whole{0};
  void add(V x) { part = part + x; }
  void settle() {
    whole = whole + part;
    part = V(0);
  }
  typename V::Real value() {
    settle();
    return sum(whole);
  }
};

// step(j) for each `stride` columns of the first `whole`, and settle() after every 32 of them.
template <class Step, class Settle>
inline void in_runs(int64_t whole, int64_t stride, Step step, Settle settle) {
  for (int64_t from = 0; from < whole; from += 32 * stride) {
    const int64_t to = whole - from < 32 * stride ? whole : from + 32 * stride;
    for (int64_t j = from; j < to; j += stride) step(j);
    settle();
  }
}

// The largest of some logits, the lowest finite number where there is none.
template <class V, class S>
double maximum(const void* logits, int64_t n) {
  using Real = typename V::Real;
  constexpr Real none = -std::numeric_limits<Real>::infinity();
  const S* s = static_cast<const S*>(logits);
  const int64_t whole = n - n % V::width;
  V top(std::numeric_limits<Real>::lowest());
  for (int64_t j = 0; j < whole; j += V::width) top = max(top, load(s + j));
  if (whole < n) top = max(top, load(s + whole, n - whole, none));
  return largest(top);
}

// s - t - shift with one rounding: what the first subtraction rounds off is added back (Knuth's TwoSum). In a
// model whose logits carry a constant offset, differences of 1e-4 would otherwise drown in it. Of 16-bit
// logits nothing is rounded off.
template <class S, class T, class V>
inline V difference_of(V s, V t, V shift) {
  V d = s - t;
  if constexpr (sizeof(S) == 2 && sizeof(T) == 2) return d - shift;
  V back = d - s, lost = (s - (d - back)) - (t + back);
  return (d - shift) + select(is_number(lost), lost, V(0));  // an infinite d has lost nothing
}

// Exponentials of student and teacher at temperature T relative to the block's references, their sums, and
// the differences of the logits. `hard` says how the student's exponentials at temperature 1 follow; only
// their sum is kept.
template <class V, class S, class T, Hard hard>
void exponentiate(const void* student, const void* teacher, int64_t n, double temperature, typename V::Real* es,
                  typename V::Real* et, typename V::Real* difference, Block<typename V::Real>* block,
                  const Ahead& next) {
  constexpr double none = -std::numeric_limits<double>::infinity();
  const S* s = static_cast<const S*>(student);
  const T* t = static_cast<const T*>(teacher);
  const Ahead ahead = next;  // a copy, which no store below can alias
  const int64_t whole = n - n % V::width;
  const Exponential<V> at_t(temperature), at_one(1.0);
  const V ref_s(block->ref_s), ref_t(block->ref_t), shift(block->apart());
  Total<V> z_s, z_t, z_h;
  auto step = [&](int64_t j, V sj, V tj) {
    V e = at_t(sj - ref_s), u = at_t(tj - ref_t);
    z_s.add(e);
    z_t.add(u);
    if constexpr (hard == Hard::square) z_h.part = fma(e, e, z_h.part);
    if constexpr (hard == Hard::own) z_h.add(at_one(sj - ref_s));
    store(es + j, e);
    store(et + j, u);
    store(difference + j, difference_of<S, T>(sj, tj, shift));
    ahead.fetch(j);
  };
  in_runs(
      whole, V::width, [&](int64_t j) { step(j, load(s + j), load(t + j)); },
      [&] { z_s.settle(), z_t.settle(), z_h.settle(); });
  if (whole < n) step(whole, load(s + whole, n - whole, none), load(t + whole, n - whole, none));
  block->z_s = z_s.value();
  block->z_t = z_t.value();
  block->z_h = hard == Hard::linear ? block->z_s : z_h.value();
}

// The same of one model.
template <class V, class S>
void exponentiate_alone(const void* logits, int64_t n, double temperature, typename V::Real* es,
                        Block<typename V::Real>* block, const Ahead& next) {
  const S* s = static_cast<const S*>(logits);
  const Ahead ahead = next;
  const int64_t whole = n - n % V::width;
  const Exponential<V> at_t(temperature);
  const V ref(block->ref_s);
  Total<V> z;
  auto step = [&](int64_t j, V sj) {
    V e = at_t(sj - ref);
    z.add(e);
    store(es + j, e);
    ahead.fetch_student(j);
  };
  in_runs(whole, V::width, [&](int64_t j) { step(j, load(s + j)); }, [&] { z.settle(); });
  if (whole < n) step(whole, load(s + whole, n - whole, -std::numeric_limits<double>::infinity()));
  block->z_s = block->z_h = z.value();
}

// Sum of exp(logits - reference), keeping nothing: for the exact 1 - p of a label that the model is sure of.
template <class V, class S>
double exponential_sum(const void* logits, int64_t n, double reference) {
  const S* s = static_cast<const S*>(logits);
  const Exponential<V> at_one(1.0);
  const V top(reference);
  const int64_t whole = n - n % V::width;
  Total<V> z;
  in_runs(whole, V::width, [&](int64_t j) { z.add(at_one(load(s + j) - top)); }, [&] { z.settle(); });
  if (whole < n) z.add(at_one(load(s + whole, n - whole, -std::numeric_limits<double>::infinity()) - top));
  return z.value();
}

// Sum of logits - reference, for label smoothing.
template <class V, class S>
double shifted_sum(const void* logits, int64_t n, double reference) {
  const S* s = static_cast<const S*>(logits);
  const V top(reference);
  const int64_t whole = n - n % V::width;
  V total(0);
  for (int64_t j = 0; j < whole; j += V::width) total = total + (load(s + j) - top);
  if (whole < n) total = total + (load(s + whole, n - whole, reference) - top);
  return sum(total);
}

// Sum of es times difference, where an exponential of 0 wins over any difference.
template <class V>
double weighted_difference(const typename V::Real* es, const typename V::Real* difference, int64_t n) {
  Total<V> total;
  for (int64_t j = 0; j < n; j += V::width) total.add(times(load(es + j), load(difference + j)));
  return total.value();
}

// f and g of a block: p = to_p et, q = to_q es, r = difference / T - rho. g takes the difference's place.
// Columns that pad the last vector have es = et = 0, hence f = g = 0.
template <class V, class D>
void diverge(const typename V::Real* es, const typename V::Real* et, typename V::Real* difference, int64_t n,
             const Divide& by, double* f_sum, double* g_sum, const Ahead& next) {
  const D divergence{by.first, by.second, by.centre};
  const Ahead ahead = next;  // a copy, which no store below can alias
  const V to_p(by.to_p), to_q(by.to_q), inverse_t(by.inverse_t), rho(by.rho);
  Total<V> f, g;
  auto step = [&](int64_t j) {
    V r = fms(load(difference + j), inverse_t, rho);
    Terms<V> x = divergence(r, load(et + j) * to_p, load(es + j) * to_q);
    f.add(x.f);
    g.add(x.g);
    store(difference + j, x.g);
    ahead.fetch(j);
  };
  in_runs(n, V::width, step, [&] { f.settle(), g.settle(); });
  *f_sum = f.value();
  *g_sum = g.value();
}

// out = of_g (g + of_q es) + of_h eh + constant, where eh are the student's exponentials at temperature 1.
// The projection comes first: where g is a multiple of q, nothing is left of it. `out` may be the student's
// own row: each vector is read before it is written.
template <class V, class S, bool soft, Hard hard>
void gradient(void* out, const void* student, const typename V::Real* g, const typename V::Real* es, int64_t n,
              const Combine& by, const Ahead& next) {
  S* to = static_cast<S*>(out);
  const S* s = static_cast<const S*>(student);
  const Ahead ahead = next;  // a copy, which no store below can alias
  const V of_g(by.of_g), of_q(by.of_q), of_h(by.of_h), constant(by.constant), ref_s(by.ref_s);
  const Exponential<V> at_one(1.0);
  auto value = [&](int64_t j, auto... part) {
    V e = load(es + j), x = constant;
    if constexpr (soft) x = fma(of_g, fma(of_q, e, load(g + j)), x);
    if constexpr (hard == Hard::linear) x = fma(of_h, e, x);
    if constexpr (hard == Hard::square) x = fma(of_h * e, e, x);
    if constexpr (hard == Hard::own) x = fma(of_h, at_one(load(s + j, part...) - ref_s), x);
    return x;
  };
  const int64_t whole = n - n % V::width;
  for (int64_t j = 0; j < whole; j += V::width) {
    store(to + j, value(j));
    soft ? ahead.fetch(j) : ahead.fetch_student(j);
  }
  if (whole < n) store(to + whole, value(whole, n - whole, 0.0), n - whole);
}

// values *= factor, in place, rounded once.
template <class V, class S>
void rescale(void* values, int64_t n, double factor) {
  S* x = static_cast<S*>(values);
  const V by(factor);
  const int64_t whole = n - n % V::width;
  for (int64_t j = 0; j < whole; j += V::width) store(x + j, load(x + j) * by);
  if (whole < n) store(x + whole, load(x + whole, n - whole, 0.0) * by, n - whole);
}

template <class V, class S, class... T>
constexpr void fill_sweeps(Sweeps<typename V::Real>& table, int s) {
  int t = 0;
  ((table.exponentiate[s][t][0] = exponentiate<V, S, T, Hard::linear>,
    table.exponentiate[s][t][1] = exponentiate<V, S, T, Hard::square>,
    table.exponentiate[s][t][2] = exponentiate<V, S, T, Hard::own>, ++t),
   ...);
  table.maximum[s] = maximum<V, S>;
  table.exponentiate_alone[s] = exponentiate_alone<V, S>;
  table.exponential_sum[s] = exponential_sum<V, S>;
  table.shifted_sum[s] = shifted_sum<V, S>;
  table.gradient[s][0] = gradient<V, S, true, Hard::linear>;
  table.gradient[s][1] = gradient<V, S, true, Hard::square>;
  table.gradient[s][2] = gradient<V, S, true, Hard::own>;
  table.gradient_alone[s] = gradient<V, S, false, Hard::linear>;
}
