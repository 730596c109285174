// machine.hpp - what a twin of an instruction may ask of the machine that the kernel runs on.
//
// The threads of a cluster (of one block, mostly) are fibers of one OS thread. A fiber runs until
// it has to wait: at a barrier, in something that a warp does together, for an mbarrier, for its
// copies. What a GPU does on its own, copies and matrix products, is an Operation here. It may end
// at any time up to a wait that promises its result. It ends where such a wait asks for it; when
// nothing else can run; or, if the schedule says so, at a random moment before.
//
// What is declared here is compiled once, by runtime.cpp, and linked to every kernel.
#pragma once
#include <emulator/watch.hpp>

#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>

namespace emulator {

constexpr int WARP = 32;
constexpr size_t STACK_BYTES = 256 << 10;  // of a fiber; each begins at a multiple of it

// What a thread of a kernel is asked for all the time. It is where the thread's stack begins.
struct Thread {
    int index, rank;  // of the thread in its block, of the block in its cluster
    int block, grid;  // the block's number, and how many there are
    char* smem;       // the block's shared memory
    int elected;      // the lane that elect_one chooses
    int inside = 0;   // in how many functions of the PTX layer: accesses are not the kernel's
};
inline __attribute__((always_inline)) Thread& current() {
    const auto here = reinterpret_cast<uintptr_t>(__builtin_frame_address(0));
    return *reinterpret_cast<Thread*>(here / STACK_BYTES * STACK_BYTES);
}
// The same, for a debugger.
extern thread_local const Thread* running;

inline __attribute__((always_inline)) int lane() { return current().index % WARP; }

// A scope whose accesses to memory are the layer's own.
struct Inside {
    __attribute__((always_inline)) Inside() { ++current().inside; }
    __attribute__((always_inline)) ~Inside() { --current().inside; }
};

// Ends the launch with a message.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ---- waiting and meeting -----------------------------------------------------------------------

void wait(const char* what, bool (*is_over)(const void*), void (*explain)(const void*),
          const void* condition);
// What a thread waits for: is_over(), and explain(), which calls `explain` if that never comes.
template <typename Condition>
__attribute__((always_inline)) inline void wait_until(const char* what,
                                                      const Condition& condition) {
    wait(
        what, [](const void* c) { return static_cast<const Condition*>(c)->is_over(); },
        [](const void* c) { static_cast<const Condition*>(c)->explain(); }, &condition);
}
void explain(const char* format, ...) __attribute__((format(printf, 1, 2)));
// Lets all others go first, once.
void let_others_go(const char* what);

// All 32 lanes of a warp bring an operand; act(operands) happens once, when the last one is here.
// It orders no accesses to memory.
void collective(const char* what, void* operand, void (*act)(void** operands));

void sync_warp();
void sync_block();
void sync_cluster();
void arrive_cluster();  // its two halves
void wait_cluster();
// Barrier `id` of the block.
void sync_named(int id, int threads);
void arrive_named(int id, int threads);

// Each thread of the warp gives up registers until it has so many, or waits for that many: those
// that others of its block have given up.
void give_registers(int count);
void take_registers(int count);

// ---- shared addresses --------------------------------------------------------------------------

constexpr uint32_t SHARED_BASE = 1024;  // of a block's first byte; 0 is none
constexpr int PEER_SHIFT = 24;          // from here on: which block of the cluster, plus 1

uint32_t shared_address(const void* pointer);
// Where `bytes` bytes at a shared address are, which must be a multiple of `align`.
char* shared_pointer(uint32_t address, int bytes, int align, const char* what);

// ---- what the GPU does on its own --------------------------------------------------------------

// What it captures is copied as it is.
class Operation {
  public:
    template <typename Act>
    explicit Operation(const Act& act) {
        static_assert(sizeof act <= sizeof act_ && alignof(Act) <= ALIGN);
        static_assert(std::is_trivially_copyable_v<Act>);
        new (act_) Act(act);
        run_ = [](void* act) { (*static_cast<Act*>(act))(); };
    }
    void operator()() { run_(act_); }

  private:
    static constexpr size_t ALIGN = 16;  // a float4's
    void (*run_)(void*);
    alignas(ALIGN) char act_[160];
};

// Ends sometime: its barrier tells.
void start(const Operation& operation);
// The same, after all copies that this thread has started.
void start_when_copied(const Operation& operation);

// What ends in the order in which it was started, and is waited for in groups: a thread's cp.async,
// a thread's TMA stores, a warp's wgmma.
enum class Queue { COPIES, STORES, PRODUCTS };
void start(Queue queue, const Operation& operation);
void close_group(Queue queue);
void finish_all_but(Queue queue, int groups);

int atomic_add(int* counter, int x);
void red_add(float* address, const float* x, int count);

// Compiled once: what a kernel's own compilation leaves to that of runtime.cpp.
#ifdef EMULATOR_RUNTIME
#define COMPILED_ONCE template
#else
#define COMPILED_ONCE extern template
#endif

}  // namespace emulator
