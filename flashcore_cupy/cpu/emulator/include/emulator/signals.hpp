// signals.hpp - what would end the process, an address where nothing is or a division by 0, is an
// error of the kernel.
#pragma once
#include <signal.h>

#include <memory>
#include <string>

namespace emulator {

struct Cluster;

struct Fault {
    int signal = 0;
    const void *address = nullptr, *place = nullptr;
};
// " divides by 0 at work.cuh:60"
std::string describe(const Fault& fault);

// While there is one, this process's signals come here: those of an OS thread that runs a cluster
// become the cluster's fault, all others go to whoever had them before.
struct CatchSignals {
    CatchSignals();
    ~CatchSignals();
};
// The cluster that this OS thread runs; none.
void faults_are_of(Cluster* cluster);

// Where an OS thread handles signals: the stack that it is on may be full.
class SignalStack {
  public:
    SignalStack();
    ~SignalStack();

  private:
    static constexpr size_t BYTES = 64 << 10;
    std::unique_ptr<char[]> memory_;
    stack_t before_;
};

}  // namespace emulator
