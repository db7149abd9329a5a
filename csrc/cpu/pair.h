// pair.h: the sweeps of the losses that compare two tensors, over one row, on any Vec. They know one row: nothing of
// masks, weights or threads. Cosine, with u = s / |s| and v = t / |t|:  1 - cos = |u - v|^2 / 2, which loses nothing
// as s -> t. The others sum one functor of ../pairs.h. Next: pair_loss.cpp, which conducts them; docs/math.md.

// Rows are short and in L1: what bounds these loops is the latency of one running sum, so there are two.

template <class V, class S, class T>
void square_sums(const void* student, const void* teacher, int64_t n, double* ss, double* tt) {
  const S* s = static_cast<const S*>(student);
  const T* t = static_cast<const T*>(teacher);
  constexpr int64_t w = V::width;
  Total<V> s0, s1, t0, t1;
  const int64_t pairs = n - n % (2 * w);
  in_runs(
      pairs, 2 * w,
      [&](int64_t j) {
        V a = load(s + j), b = load(s + j + w), c = load(t + j), d = load(t + j + w);
        s0.part = fma(a, a, s0.part), s1.part = fma(b, b, s1.part);
        t0.part = fma(c, c, t0.part), t1.part = fma(d, d, t1.part);
      },
      [&] { s0.settle(), s1.settle(), t0.settle(), t1.settle(); });
  for (int64_t j = pairs; j < n; j += w) {
    const int64_t k = n - j < w ? n - j : w;
    V a = load(s + j, k, 0.0), c = load(t + j, k, 0.0);
    s0.part = fma(a, a, s0.part), t0.part = fma(c, c, t0.part);
  }
  *ss = s0.value() + s1.value();
  *tt = t0.value() + t1.value();
}

// e = v - u with one rounding: the product that would round s / |s| is corrected by its own error.
template <class V>
inline V apart(V s, V inverse_s, V t, V inverse_t) {
  V u = s * inverse_s;
  return fms(t, inverse_t, u) - fms(s, inverse_s, u);
}

// Sums of e^2 and of u e.
template <class V, class S, class T>
void distance(const void* student, const void* teacher, int64_t n, double inverse_s, double inverse_t, double* e_square,
              double* u_e) {
  const S* s = static_cast<const S*>(student);
  const T* t = static_cast<const T*>(teacher);
  const V is(inverse_s), it(inverse_t);
  constexpr int64_t w = V::width;
  Total<V> square0, square1, along0, along1;
  auto step = [&](V sj, V tj, Total<V>& square, Total<V>& along) {
    V e = apart(sj, is, tj, it);
    square.part = fma(e, e, square.part);
    along.part = fma(sj * is, e, along.part);
  };
  const int64_t pairs = n - n % (2 * w);
  in_runs(
      pairs, 2 * w,
      [&](int64_t j) {
        step(load(s + j), load(t + j), square0, along0);
        step(load(s + j + w), load(t + j + w), square1, along1);
      },
      [&] { square0.settle(), square1.settle(), along0.settle(), along1.settle(); });
  for (int64_t j = pairs; j < n; j += w) {
    const int64_t k = n - j < w ? n - j : w;
    step(load(s + j, k, 0.0), load(t + j, k, 0.0), square0, along0);
  }
  *e_square = square0.value() + square1.value();
  *u_e = along0.value() + along1.value();
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
  if (whole < n) store(to + whole, value(load(s + whole, n - whole, 0.0), load(t + whole, n - whole, 0.0)), n - whole);
}

// A sum that loses nothing: what each addition rounds off (Knuth's TwoSum) is summed beside it, and lanes meet in double.
template <class V>
struct ExactTotal {
  V whole{0}, lost{0};
  void add(V x) {
    V next = whole + x, back = next - whole;
    lost = lost + ((whole - (next - back)) + (x - back));
    whole = next;
  }
  double value() const {
    typename V::Real lanes[V::width], rests[V::width];
    store(lanes, whole), store(rests, lost);
    double total = 0.0;
    for (int i = 0; i < V::width; ++i) total += static_cast<double>(lanes[i]) + rests[i];
    return total;
  }
};

// The sum of Pair over a row; grad = of_g g, where grad is not null. grad may be the student's own row.
template <class V, class S, class T, class Pair>
double entries(void* grad, const void* student, const void* teacher, int64_t n, double of_g) {
  S* to = static_cast<S*>(grad);
  const S* s = static_cast<const S*>(student);
  const T* t = static_cast<const T*>(teacher);
  const Pair pair;
  const V by(of_g);
  Total<V> f;
  ExactTotal<V> first;
  auto step = [&](V sj, V tj) {
    PairTerms<V> x = pair(sj, tj);
    f.add(x.f);
    if constexpr (Pair::has_first) first.add(x.first);
    return by * x.g;
  };
  const int64_t whole = n - n % V::width;
  in_runs(
      whole, V::width,
      [&](int64_t j) {
        V g = step(load(s + j), load(t + j));
        if (to) store(to + j, g);
      },
      [&] { f.settle(); });
  if (whole < n) {
    V g = step(load(s + whole, n - whole, 0.0), load(t + whole, n - whole, 0.0));  // a pair of zeros counts 0
    if (to) store(to + whole, g, n - whole);
  }
  return f.value() + first.value();
}

template <class V, class S, class... T>
constexpr void fill_pairs(PairSweeps<static_cast<int>(sizeof...(T))>& table, int s) {
  int t = 0;
#define DISTIL_FAST_PAIR(name, Pair) table.entries[static_cast<int>(PairKind::name)][s][t] = entries<V, S, T, Pair>,
  ((table.square_sums[s][t] = square_sums<V, S, T>, table.distance[s][t] = distance<V, S, T>,
    table.cosine_gradient[s][t] = cosine_gradient<V, S, T>, DISTIL_FAST_PAIRS(DISTIL_FAST_PAIR)++ t),
   ...);
#undef DISTIL_FAST_PAIR
}
