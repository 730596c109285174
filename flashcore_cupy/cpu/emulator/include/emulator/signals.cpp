// signals.cpp - from a signal to the kernel that has caused it.
#include <emulator/cluster.hpp>
#include <emulator/places.hpp>
#include <ucontext.h>

#include <cstdio>
#include <mutex>

namespace emulator {

static thread_local Cluster* active = nullptr;
void faults_are_of(Cluster* cluster) { active = cluster; }

// Where the instruction is, plus 1: a place is what a call returns to, which lies behind it.
static const void* place_of(void* context) {
    uintptr_t at = 0;
#if defined(__linux__) && defined(__x86_64__)
    at = uintptr_t(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]);
#elif defined(__linux__) && defined(__aarch64__)
    at = uintptr_t(static_cast<ucontext_t*>(context)->uc_mcontext.pc);
#else
    (void)context;
#endif
    return at ? reinterpret_cast<const void*>(at + 1) : nullptr;
}

constexpr int SIGNALS[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP};
static struct sigaction before[NSIG];

// What is interrupted never goes on. If it is a thread, the scheduler goes on; if it is the
// scheduler, which makes copies, whoever runs the cluster.
static void handle(int signal, siginfo_t* info, void* context) {
    if (!active) {  // no kernel's: it comes once more, to whoever had it before
        sigaction(signal, &before[signal], nullptr);
        return;
    }
    active->fault = {signal, info->si_addr, place_of(context)};
    Context interrupted;
    switch_to(interrupted, running ? active->scheduler->context : active->outside);
}

static std::mutex catching;
static int launches = 0;

CatchSignals::CatchSignals() {
    const std::lock_guard<std::mutex> lock(catching);
    if (launches++ > 0) return;
    struct sigaction own = {}, found;
    own.sa_sigaction = handle;
    own.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (const int signal : SIGNALS) {
        sigaction(signal, &own, &found);
        // Another kernel's library, which did the same, may have put it back.
        if (found.sa_sigaction != handle) before[signal] = found;
    }
}
CatchSignals::~CatchSignals() {
    const std::lock_guard<std::mutex> lock(catching);
    if (--launches > 0) return;
    for (const int signal : SIGNALS) sigaction(signal, &before[signal], nullptr);
}

SignalStack::SignalStack() : memory_(new char[BYTES]) {
    stack_t own = {};
    own.ss_sp = memory_.get();
    own.ss_size = BYTES;
    sigaltstack(&own, &before_);
}
SignalStack::~SignalStack() { sigaltstack(&before_, nullptr); }

std::string describe(const Fault& fault) {
    std::string what =
        " does what C++ leaves undefined: an int that overflows, a division by 0, or an index "
        "outside of its array";
    if (fault.signal == SIGFPE) what = " divides by 0";
    if (fault.signal == SIGSEGV || fault.signal == SIGBUS) {
        char text[80];
        // Of a vector access that is not aligned, x86 does not say the address.
        snprintf(text, sizeof text, " touches address %p, where nothing is%s", fault.address,
                 fault.address ? "" : ", or a misaligned one");
        what = text;
    }
    return what + at_line(fault.place);
}

}  // namespace emulator
