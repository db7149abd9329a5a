// dispatch.cpp: chooses the instruction set, once, by cpuid. DISTIL_FAST_ISA (avx512_bf16, avx512, avx2,
// portable) chooses another. Knows the tables' names, and nothing of what is in them. Next: table.h.
#include "dispatch.h"

#include <cstdlib>
#include <cstring>

namespace distil_fast {

extern const Table<float> table_portable;
extern const Table<double> table_double;
#if defined(__x86_64__)
extern const Table<float> table_avx2, table_avx512, table_avx512_bf16;
#endif

namespace {

struct Choice {
  const char* name;
  const Table<float>* table;
  bool present;
};

const Choice* choices() {  // best first
#if defined(__x86_64__)
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const Choice list[] = {
      {"avx512_bf16", &table_avx512_bf16, avx512 && __builtin_cpu_supports("avx512bf16")},
      {"avx512", &table_avx512, avx512},
      {"avx2", &table_avx2,
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")},
      {"portable", &table_portable, true},
      {nullptr, nullptr, false}};
#else
  static const Choice list[] = {{"portable", &table_portable, true}, {nullptr, nullptr, false}};
#endif
  return list;
}

const Choice* choose(const char* name) {
  for (const Choice* c = choices(); c->name; ++c)
    if (c->present && (!name || !std::strcmp(c->name, name))) return c;
  return nullptr;
}

const Choice*& chosen() {
  static const Choice* choice = [] {
    const Choice* asked = choose(std::getenv("DISTIL_FAST_ISA"));
    return asked ? asked : choose(nullptr);
  }();
  return choice;
}

}  // namespace

template <>
const Table<float>& table<float>() {
  return *chosen()->table;
}

template <>
const Table<double>& table<double>() {
  return table_double;
}

const char* instruction_set() { return chosen()->name; }

bool use_instruction_set(const char* name) {
  const Choice* choice = choose(name);
  if (choice) chosen() = choice;
  return choice != nullptr;
}

}  // namespace distil_fast
