// bits.h: the bits of a float as an integer and back (std::bit_cast would be a shared function: see table.h).
template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}
