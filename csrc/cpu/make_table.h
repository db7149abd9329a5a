// make_table.h: fills the table of one instruction set and one Real with pointers to its sweeps, over all
// dtypes T. Knows which sweeps there are, and nothing of what they do.

template <class V, class... T>
constexpr Table<typename V::Real> make_table() {
  Table<typename V::Real> table{};
  int s = 0;
  ((fill_sweeps<V, T, T...>(table.rows, s), fill_prepare<V, T>(table.rows, s), fill_softmax<V, T>(table.softmax, s),
    fill_pairs<V, T, T...>(table.pairs, s), fill_topk<V, T>(table.topk, s), table.rescale[s] = rescale<V, T>, ++s),
   ...);
  table.rows.weighted_difference = weighted_difference<V>;
  table.topk.total = total<V>;
  fill_shards<V, T...>(table.shards);
#define DISTIL_FAST_ROW(name, Functor)                                            \
  table.rows.diverge[static_cast<int>(DivergenceId::name)] = diverge<V, Functor>; \
  table.rows.centred[static_cast<int>(DivergenceId::name)] = Functor::centred;
  DISTIL_FAST_DIVERGENCES(DISTIL_FAST_ROW)
#undef DISTIL_FAST_ROW
  return table;
}
