// topk.h: the sweeps of the row loss with a top-k teacher over one block of columns, on any Vec, beyond those of
// sweeps.h: the student alone at two temperatures, and what is left of it outside the ids. They know one block: nothing
// of ids, rows or weights. Next: topk.cpp, which conducts them.

// exponentiate_alone (sweeps.h) for a student whose exponentials at temperature 1 are wanted too: only their sum is
// kept.
template <class V, class S, Hard hard>
void exponentiate_twice(const void* logits, int64_t n, double temperature, typename V::Real* es,
                        Block<typename V::Real>* block, const Ahead& next) {
  const S* s = static_cast<const S*>(logits);
  const Ahead ahead = next;  // a copy, which no store below can alias
  const int64_t whole = n - n % V::width;
  const Exponential<V> at_t(temperature), at_one(1.0);
  const V ref(block->ref_s);
  Total<V> z, z_h;
  auto step = [&](int64_t j, V sj) {
    V e = at_t(sj - ref);
    z.add(e);
    if constexpr (hard == Hard::square) z_h.part = fma(e, e, z_h.part);
    if constexpr (hard == Hard::own) z_h.add(at_one(sj - ref));
    store(es + j, e);
    ahead.fetch_student(j);
  };
  in_runs(whole, V::width, [&](int64_t j) { step(j, load(s + j)); }, [&] { z.settle(), z_h.settle(); });
  if (whole < n) step(whole, load(s + whole, n - whole, -std::numeric_limits<double>::infinity()));
  block->z_s = z.value();
  block->z_h = z_h.value();
}

// Sum of exponentials that are in the scratch; the last vector's padding holds zeros.
template <class V>
double total(const typename V::Real* es, int64_t n) {
  Total<V> z;
  in_runs(n, V::width, [&](int64_t j) { z.add(load(es + j)); }, [&] { z.settle(); });
  return z.value();
}

template <class V, class S>
constexpr void fill_topk(TopKSweeps<typename V::Real>& table, int s) {
  table.exponentiate[s][static_cast<int>(Hard::linear)] = exponentiate_alone<V, S>;
  table.exponentiate[s][static_cast<int>(Hard::square)] = exponentiate_twice<V, S, Hard::square>;
  table.exponentiate[s][static_cast<int>(Hard::own)] = exponentiate_twice<V, S, Hard::own>;
}
