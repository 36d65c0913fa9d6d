// The processor's matrix registers (AMX): eight tiles, each of up to sixteen rows of 64 bytes.
#pragma once

#include <cstdint>
#if defined(__AMX_TILE__) && defined(__linux__) && !defined(ELMAN_PORTABLE)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define ELMAN_TILES 1
#endif

namespace {

#ifdef ELMAN_TILES
// The system saves tiles only of processes that have asked for them.
bool tiles_allowed() {
    constexpr int request_permission = 0x1023, tile_data = 18;
    static const bool allowed = syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
    return allowed;
}

// Rows of each tile, all of 64 bytes. The compiler's own function tells it of eight bytes of this alone.
struct TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};

    void load() const { asm volatile("ldtilecfg %0" ::"m"(*this)); }
};

// Before tiles are loaded: the compiler does not know that they read memory, and might write it later.
inline void settle_memory() { asm volatile("" ::: "memory"); }
#else
bool tiles_allowed() { return false; }
#endif

}  // namespace
