// launch.hpp - how Python starts a kernel: `EMULATOR_LAUNCH(entry)` defines the function for it.
#pragma once
#include <emulator/machine.hpp>

#include <utility>

namespace emulator {

// An array that the kernel may touch. `state` is a byte for each of its bytes: 0 for what nobody
// has written, 1 for what has a value, 2 for what lies between the array's elements. Without it all
// have a value.
struct Array {
    char* begin;
    size_t bytes;
    const char* name;
    unsigned char* state;
    int is_writable;
};

// In which order things happen that may happen in any.
struct Options {
    uint64_t seed;
    int eager;                 // of 100 looks of the scheduler, at how many an operation ends early
    const volatile int* stop;  // not 0: nobody waits for the result any more
};

struct Grid {
    int blocks, threads, smem_bytes, cluster;
    int workers;  // OS threads
    Options options;
    const Array* arrays;  // for a checking build; none: it does not look at global memory
    int array_count;
};

// Runs the kernel for every thread of the grid. Writes what went wrong into `message`; returns
// whether something did.
int run_grid(const Grid& grid, void (*kernel)(const char* params), const void* params,
             size_t params_bytes, char* message, size_t size);

// The kernel's parameters lie one after the other, each at a multiple of its alignment.
template <typename... Params>
struct Parameters {
    static constexpr size_t COUNT = sizeof...(Params);
    struct Places {
        size_t at[COUNT + 1] = {};
        constexpr Places() {
            constexpr size_t sizes[] = {sizeof(Params)..., 0}, aligns[] = {alignof(Params)..., 1};
            size_t end = 0;
            for (size_t i = 0; i <= COUNT; end = at[i] + sizes[i], ++i)
                at[i] = (end + aligns[i] - 1) / aligns[i] * aligns[i];
        }
    };
    static constexpr Places PLACES = {};

    template <void (*KERNEL)(Params...), size_t... I>
    static void call(const char* params, std::index_sequence<I...>) {
        KERNEL(*reinterpret_cast<const std::remove_cv_t<Params>*>(params + PLACES.at[I])...);
    }
    template <void (*KERNEL)(Params...)>
    static void call(const char* params) {
        call<KERNEL>(params, std::make_index_sequence<COUNT>());
    }
};
template <typename... Params>
Parameters<Params...> parameters_of(void (*)(Params...));

}  // namespace emulator

// Runs on a stack that is no fiber's, where accesses cannot be watched.
#define EMULATOR_LAUNCH(entry)                                                                   \
    extern "C" __attribute__((visibility("default"), no_sanitize("thread"))) int launch_##entry( \
        const void* params, const emulator::Grid* grid, char* message, int size) {               \
        using Own = decltype(emulator::parameters_of(entry));                                    \
        return emulator::run_grid(*grid, &Own::call<entry>, params, Own::PLACES.at[Own::COUNT],  \
                                  message, size_t(size));                                        \
    }
