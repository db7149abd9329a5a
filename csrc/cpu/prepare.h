// prepare.h: the sweeps for rows that are not plain logits, on any Vec: `prepare` turns a block of what a model gives
// into logits, before all other sweeps; `chain` turns the gradient of those into that of what was given, after them.
// They know one block and its scalars: nothing of rows, forms of teacher or divergences. Next: row_loss.cpp.

// tanh(x): at most 6.5 ulp, small arguments included.
template <class V>
inline V tanh(V x) {
  V e = expm1(V(-2) * abs(x)), y = (V(0) - e) / (V(2) + e);
  return select(x < V(0), V(0) - y, y);
}

// 1 - tanh(x)^2, without the subtraction: beyond |x| = 3 nothing would be left of it. Its error is that of exp(-2 |x|).
template <class V>
inline V tanh_slope(V x) {
  V u = exp(V(-2) * abs(x)), d = V(1) + u;
  return V(4) * u / (d * d);
}

// step(x, part...) for each vector of n columns; `part` is how many columns, where they are fewer than a vector has.
template <class V, class S, class Step>
inline void for_vectors(const S* from, int64_t n, Step step) {
  const int64_t whole = n - n % V::width;
  for (int64_t j = 0; j < whole; j += V::width) step(j, load(from + j));
  if (whole < n) step(whole, load(from + whole, n - whole, 0.0), n - whole);
}

// logits = scale x; cap tanh(scale x / cap), where -inf, a masked column, stays; or scale log x, which a negative or
// infinite x has not.
template <class V, class S>
void prepare(const void* given, int64_t n, const Prepare& by, typename V::Real* logits) {
  constexpr double inf = std::numeric_limits<double>::infinity();
  const S* from = static_cast<const S*>(given);
  const V scale(by.scale);
  if (by.logarithm) {
    const V none(-inf), beyond(inf), wrong(std::numeric_limits<double>::quiet_NaN());
    for_vectors<V>(from, n, [&](int64_t j, V x, auto... part) {
      V y = select(x < beyond, scale * log(select(V(0) < x, x, V(1))), wrong);
      store(logits + j, select(V(0) < x, y, select(is_zero(x), none, wrong)), part...);
    });
  } else if (by.cap != 0.0) {
    const V cap(by.cap), to_unit(by.scale / by.cap), lowest(std::numeric_limits<typename V::Real>::lowest());
    for_vectors<V>(from, n, [&](int64_t j, V x, auto... part) {
      store(logits + j, select(x < lowest, x, cap * tanh(x * to_unit)), part...);
    });
  } else {
    for_vectors<V>(from, n, [&](int64_t j, V x, auto... part) { store(logits + j, scale * x, part...); });
  }
}

// out = gradient times the slope of what `prepare` did to the student. `out` may be the student's own row.
template <class V, class S>
void chain(void* out, const void* student, const typename V::Real* gradient, int64_t n, const Prepare& by) {
  S* to = static_cast<S*>(out);
  const S* s = static_cast<const S*>(student);
  const V scale(by.scale);
  if (by.cap == 0.0) {
    for_vectors<V>(gradient, n, [&](int64_t j, V g, auto... part) { store(to + j, scale * g, part...); });
    return;
  }
  const V to_unit(by.scale / by.cap);
  for_vectors<V>(s, n, [&](int64_t j, V x, auto... part) {
    store(to + j, load(gradient + j) * (scale * tanh_slope(x * to_unit)), part...);
  });
}

template <class V, class S>
constexpr void fill_prepare(Sweeps<typename V::Real>& table, int s) {
  table.prepare[s] = prepare<V, S>;
  table.chain[s] = chain<V, S>;
}
