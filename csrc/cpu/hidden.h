// hidden.h: the sweeps of the cosine loss over one row of hidden states, on any Vec. They know one row:
// nothing of masks, weights or threads. With u = s / |s| and v = t / |t|:  1 - cos = |u - v|^2 / 2, which
// loses nothing as s -> t. Next: hidden.cpp, which conducts them; docs/math.md for the gradient.

template <class V, class S>
double square_sum(const void* hidden, int64_t n) {
  const S* x = static_cast<const S*>(hidden);
  const int64_t whole = n - n % V::width;
  V total(0);
  for (int64_t j = 0; j < whole; j += V::width) total = fma(load(x + j), load(x + j), total);
  if (whole < n) {
    V last = load(x + whole, n - whole, 0.0);
    total = fma(last, last, total);
  }
  return sum(total);
}

// e = v - u with one rounding: the product that would round s / |s| is corrected by its own error.
template <class V>
inline V apart(V s, V inverse_s, V t, V inverse_t) {
  V u = s * inverse_s;
  return fms(t, inverse_t, u) - fms(s, inverse_s, u);
}

// Sums of e^2 and of u e.
template <class V, class S, class T>
void distance(const void* student, const void* teacher, int64_t n, double inverse_s, double inverse_t,
              double* e_square, double* u_e) {
  const S* s = static_cast<const S*>(student);
  const T* t = static_cast<const T*>(teacher);
  const V is(inverse_s), it(inverse_t);
  const int64_t whole = n - n % V::width;
  V square(0), along(0);
  auto step = [&](V sj, V tj) {
    V e = apart(sj, is, tj, it);
    square = fma(e, e, square);
    along = fma(sj * is, e, along);
  };
  for (int64_t j = 0; j < whole; j += V::width) step(load(s + j), load(t + j));
  if (whole < n) step(load(s + whole, n - whole, 0.0), load(t + whole, n - whole, 0.0));
  *e_square = sum(square);
  *u_e = sum(along);
}

// grad = of_e e + of_u u. May be the student's own row.
template <class V, class S, class T>
void cosine_gradient(void* grad, const void* student, const void* teacher, int64_t n, double inverse_s,
                     double inverse_t, double of_e, double of_u) {
  S* to = static_cast<S*>(grad);
  const S* s = static_cast<const S*>(student);
  const T* t = static_cast<const T*>(teacher);
  const V is(inverse_s), it(inverse_t), a(of_e), b(of_u);
  auto value = [&](V sj, V tj) { return fma(a, apart(sj, is, tj, it), b * (sj * is)); };
  const int64_t whole = n - n % V::width;
  for (int64_t j = 0; j < whole; j += V::width) store(to + j, value(load(s + j), load(t + j)));
  if (whole < n)
    store(to + whole, value(load(s + whole, n - whole, 0.0), load(t + whole, n - whole, 0.0)), n - whole);
}

template <class V, class S, class... T>
constexpr void fill_hidden(HiddenSweeps<static_cast<int>(sizeof...(T))>& table, int s) {
  table.square_sum[s] = square_sum<V, S>;
  int t = 0;
  ((table.distance[s][t] = distance<V, S, T>, table.gradient[s][t] = cosine_gradient<V, S, T>, ++t), ...);
}
