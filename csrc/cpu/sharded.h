// sharded.h: the sweeps that only a shard of a vocabulary needs: sums from which the distance of two models follows
// without cancellation, and the sum beside the largest column. They know one block and its scalars: nothing of rows,
// processes or labels. Next: sharded.cpp, which conducts them.

// gap, tail and lean (ShardSums) of a block whose references are its shard's; to_q brings es to the reference that
// differences are relative to, which is a rounded one; the lean is that of undivided differences, less a pivot. Columns that pad the last vector have es = et = 0 and add nothing.
template <class V, bool of_teacher>
void shard_sums(const typename V::Real* es, const typename V::Real* et, const typename V::Real* difference, int64_t n,
                double inverse_t, double to_q, double pivot, double* out) {
  const V by(inverse_t), to(to_q), middle(pivot);
  Total<V> gap, tail, lean;
  auto step = [&](int64_t j) {
    V apart = load(difference + j), d = apart * by, p = load(et + j), q = load(es + j) * to;
    gap.add(gap_of(d, p, q));
    if constexpr (of_teacher) {
      tail.add(ForwardKL{0.0, 0.0, 0.0}(d, p, q).f);
      lean.add(times(p, apart - middle));
    } else {
      tail.add(ReverseKL{0.0, 0.0, 0.0}(d, p, q).f);
      lean.add(times(q, apart - middle));
    }
  };
  in_runs(n, V::width, step, [&] { gap.settle(), tail.settle(), lean.settle(); });
  out[0] = gap.value(), out[1] = tail.value(), out[2] = lean.value();
}

// Sum of exp(logits - top) over the columns below `top`, and how many are not.
template <class V, class S>
void sum_below(const void* logits, int64_t n, double top, double* below, double* at_top) {
  const S* s = static_cast<const S*>(logits);
  const Exponential<V> at_one(1.0);
  const V highest(top);
  const int64_t whole = n - n % V::width;
  Total<V> sum, count;
  auto step = [&](V sj) {
    auto less = sj < highest;
    sum.add(select(less, at_one(sj - highest), V(0)));
    count.add(select(less, V(0), V(1)));
  };
  in_runs(whole, V::width, [&](int64_t j) { step(load(s + j)); }, [&] { sum.settle(), count.settle(); });
  if (whole < n) step(load(s + whole, n - whole, -std::numeric_limits<double>::infinity()));
  *below = sum.value();
  *at_top = count.value();
}

template <class V, class... S>
constexpr void fill_shards(ShardSweeps<typename V::Real>& table) {
  table.sums[0] = shard_sums<V, false>;
  table.sums[1] = shard_sums<V, true>;
  int s = 0;
  ((table.sum_below[s++] = sum_below<V, S>), ...);
}
