// Threads that work on one thing: where they meet, and the memory that each keeps.
#pragma once

#include <atomic>
#include <cstdlib>
#include <new>
#include <sched.h>

namespace {

struct Barrier {
    alignas(64) std::atomic<int> arrived{0};
    alignas(64) std::atomic<int> phase{0};

    void wait(int team) {
        const int now = phase.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == team) {
            arrived.store(0, std::memory_order_relaxed);
            phase.store(now + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; phase.load(std::memory_order_acquire) == now; spins++) {
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
            if (spins > 1000) sched_yield();  // the other may be waiting for this very core
        }
    }
};

// Memory that a thread keeps from call to call: fresh pages cost as much as a step.
struct Scratch {
    char* memory = nullptr;
    size_t size = 0;

    char* take(size_t wanted) {
        if (wanted > size) {
            std::free(memory);
            size = (wanted + 4095) / 4096 * 4096;
            memory = (char*)std::aligned_alloc(4096, size);
            if (!memory) throw std::bad_alloc();
        }
        return memory;
    }
    ~Scratch() { std::free(memory); }
};

}  // namespace
