// shadow.hpp - in a checking build: who has written each byte of memory, and who has read it since.
#pragma once
#ifdef EMULATOR_CHECK
#include <emulator/clocks.hpp>

#include <algorithm>

namespace emulator {

// Somebody touches memory. Who: a thread, or an operation that the thread has started.
struct Access {
    int cluster;
    size_t who, thread;  // their numbers in the cluster
    Epoch epoch;
    const Knowledge* knows;  // the thread, when it began
    const void* place;
    bool writes;
    bool is_plain = false;     // a store that the compiler tells of, which is about to be made
    bool is_async = false;     // by the asynchronous proxy
    bool is_atomic = false;    // others' atomics may come at the same time
    bool is_together = false;  // by all lanes of the warp as one
    bool in_flight = false;    // not over before the thread has waited: nobody knows of it yet
    bool completes = false;    // now the thread has waited for it
};

// What is remembered of accesses to the same bytes, in one epoch, by lanes of a warp.
struct Record {
    int cluster;
    uint32_t warp, lanes;
    Epoch epoch;
    uint16_t bytes;  // of the line, a bit each
    bool writes, is_async, is_atomic, is_together, in_flight;
    const void* place;
};

enum class Wrong { NOTHING, UNWRITTEN, RACE, NO_FENCE };
struct Finding {
    Wrong what = Wrong::NOTHING;
    int byte = 0;  // of the line
    Record before{};
};

// 16 bytes of memory.
class Line {
  public:
    // Whether the same read is remembered: nobody has written since.
    bool has_read(uint16_t bytes, const Access& access) const;
    Finding check(uint16_t bytes, const Access& access) const;
    // An access that has changed nothing takes the place of no other one.
    void remember(uint16_t bytes, const Access& access, bool changes = true);
    // Whether the TMA, the wgmmas and other blocks' threads are done with it, as far as is known.
    Finding check_end(size_t first_own, size_t end_own, const Access& end) const;
    void begin(uint16_t written) {
        records_.clear();
        written_ = written;
    }

  private:
    std::vector<Record> records_;
    uint16_t written_ = 0;
};

// A range of memory, line by line.
class Shadow {
  public:
    static constexpr size_t LINE = 16;

    // is_written: all bytes have a value, or somebody else knows.
    void watch(const char* begin, size_t bytes, bool is_written) {
        begin_ = reinterpret_cast<uintptr_t>(begin) / LINE * LINE;
        lines_.resize((reinterpret_cast<uintptr_t>(begin) + bytes - begin_ + LINE - 1) / LINE);
        for (Line& line : lines_) line.begin(is_written ? 0xffff : 0);
    }
    // Says what is wrong with an access, and at which byte of the range; or remembers it.
    Finding touch(const void* memory, size_t bytes, const Access& access, size_t& byte) {
        Finding found;
        each_line(memory, bytes, [&](Line& line, size_t at, uint16_t mask) {
            if (found.what != Wrong::NOTHING || line.has_read(mask, access)) return;
            found = line.check(mask, access);
            if (found.what == Wrong::NOTHING) line.remember(mask, access);
            byte = at + size_t(found.byte);
        });
        return found;
    }
    Finding check_end(size_t first_own, size_t end_own, const Access& end) const {
        for (const Line& line : lines_)
            if (const Finding f = line.check_end(first_own, end_own, end); f.what != Wrong::NOTHING)
                return f;
        return {};
    }
    void remember_unchanged(const void* memory, size_t bytes, const Access& access) {
        each_line(memory, bytes,
                  [&](Line& line, size_t, uint16_t mask) { line.remember(mask, access, false); });
    }

  private:
    uintptr_t begin_ = 0;
    std::vector<Line> lines_;

    template <typename Act>
    void each_line(const void* memory, size_t bytes, const Act& act) {
        size_t at = reinterpret_cast<uintptr_t>(memory) - begin_;
        for (const size_t end = at + bytes; at < end;) {
            const size_t first = at % LINE, last = std::min(first + (end - at), LINE);
            act(lines_[at / LINE], at / LINE * LINE, uint16_t((1u << last) - (1u << first)));
            at += last - first;
        }
    }
};

}  // namespace emulator

#else

namespace emulator {
struct Shadow {};
}  // namespace emulator

#endif
