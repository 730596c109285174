// setmaxnreg.cpp - how many registers the threads of each warp have. A warp that asks for more than
// others of its block have given up waits for them: on a GPU too, for ever.
#include <emulator/cluster.hpp>
#include <emulator/places.hpp>

#include <algorithm>

namespace emulator {

int start_registers(int threads) {
    constexpr int OF_MULTIPROCESSOR = 65536, WARPGROUP = 4 * WARP;
    const int warpgroups = (threads + WARPGROUP - 1) / WARPGROUP;
    return std::min(255, OF_MULTIPROCESSOR / (warpgroups * WARPGROUP) / 8 * 8);
}

void give_registers(int count) {
    CALLED_HERE;
    meet("setmaxnreg.dec", nullptr, [](void**) {});
    Warp& w = *fiber().warp;
    if (count > w.registers) fail_there("setmaxnreg.dec: %d, of %d registers", count, w.registers);
    fiber().owner->spare_registers += WARP * (w.registers - count);
    w.registers = count;
}

// The warp has what it waits for, or can have it.
struct MoreRegisters {
    const Block& block;
    const Warp& warp;
    int count;

    int missing() const { return WARP * (count - warp.registers) - block.spare_registers; }
    static bool is_over(const void* c) {
        return static_cast<const MoreRegisters*>(c)->missing() <= 0;
    }
    static void explain_it(const void* c) {
        explain(", for which the block lacks %d registers",
                static_cast<const MoreRegisters*>(c)->missing());
    }
};

void take_registers(int count) {
    CALLED_HERE;
    meet("setmaxnreg.inc", nullptr, [](void**) {});
    Warp& w = *fiber().warp;
    Block& b = *fiber().owner;
    const MoreRegisters more = {b, w, count};
    while (more.missing() > 0)
        wait_there("setmaxnreg.inc", MoreRegisters::is_over, MoreRegisters::explain_it, &more);
    b.spare_registers -= WARP * (count - w.registers);
    w.registers = count;
}

}  // namespace emulator
