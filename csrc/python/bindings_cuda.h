// bindings_cuda.h: how bindings.cpp gets at the CUDA half of the module, which is compiled only where nvcc is. Next:
// bindings_cuda.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace distil_fast {
void bind_cuda(pybind11::module_& m);
}
