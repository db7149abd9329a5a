// buffers.h: memory for gradients. A fresh 62 MB buffer costs 14 ms of page faults where computing what goes
// into it takes 4, so blocks are of huge pages, and a freed one waits for the next step. Meanwhile the kernel
// may take its pages back (MADV_FREE), so that keeping it costs a process under memory pressure nothing.
// Knows nothing of tensors.
#pragma once

#include <cstddef>

namespace distil_fast {

// Memory that is at least so large, uninitialised. Throws std::bad_alloc.
void* acquire_buffer(size_t bytes);

// Gives it back: to the next call that it is large enough for, or, if the next call needs more, to the
// system.
void release_buffer(void* buffer);

}  // namespace distil_fast
