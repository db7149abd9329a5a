// bindings_shards.h: how bindings.cpp gets at the doorway of sharded vocabularies. Next: bindings_shards.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace distil_fast {
void bind_shards(pybind11::module_& m);
}
