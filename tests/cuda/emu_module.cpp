// emu_module.cpp: the CUDA half of distil_fast._C with the emulated device in the place of the driver, as a module of its
// own: what distil_fast/backends/cuda.py calls, on memory of the CPU. Next: emulated.py, which builds it.
#include <pybind11/pybind11.h>

#include "cuda/hw.cuh"
#include "python/bindings_cuda.h"

PYBIND11_MODULE(EMU_MODULE, m) {
  distil_fast::bind_cuda(m);
  m.def("use_device", [](int major, int shared_per_block, int multiprocessors) {
    distil_fast::hw::the_device() = {major, shared_per_block, multiprocessors};
  });
}
