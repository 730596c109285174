// registers.cpp - in a checking build: the registers of wgmma, which lie on the threads' stacks.
#include <emulator/memory.hpp>
#include <emulator/places.hpp>

#ifdef EMULATOR_CHECK

#include <algorithm>

namespace emulator {

// A word for each register, from the first one that a wgmma uses to the last.
enum : unsigned char { UNTOUCHED, TOUCHED, IN_USE };

void Registers::cover(const char* first, size_t size) {
    const char* const low = begin ? std::min(begin, first) : first;
    const char* const high = std::max(begin + 4 * words.size(), first + size);
    if (low == begin && high == begin + 4 * words.size()) return;
    std::vector<unsigned char> more(size_t(high - low) / 4, UNTOUCHED);
    std::copy(words.begin(), words.end(), more.begin() + (begin ? begin - low : 0) / 4);
    begin = low;
    words.swap(more);
}
unsigned char* Registers::at(const void* p) {
    return words.data() + size_t(static_cast<const char*>(p) - begin) / 4;
}

void touch_registers(Fiber& f, const void* p, size_t bytes, const void* place) {
    Registers& registers = f.watched.registers;
    unsigned char* const word = registers.at(p);
    const size_t count =
        std::min((bytes + 3) / 4, size_t(registers.words.data() + registers.words.size() - word));
    if (memchr(word, IN_USE, count))
        fail_with("too soon: " + emulator::name_of(f) +
                  " touches a register of a wgmma that is not waited for" + at_line(place));
    std::memset(word, TOUCHED, count);
}
void note_registers(const void* p, size_t bytes) {
    Fiber& f = fiber();
    Registers& registers = f.watched.registers;
    if (!registers.are_fenced)
        fail_with("no fence: " + emulator::name_of(f) +
                  " starts its first wgmma before any wgmma_fence" +
                  at_line(__builtin_return_address(0)));
    registers.cover(static_cast<const char*>(p), bytes);
    unsigned char* const word = registers.at(p);
    if (memchr(word, TOUCHED, bytes / 4))
        fail_with("no fence: " + emulator::name_of(f) +
                  " has touched a register of the wgmma after its last wgmma_fence" +
                  at_line(__builtin_return_address(0)));
    std::memset(word, IN_USE, bytes / 4);
    registers.in_use.push_back({f.warp->watched.groups, p, bytes});
}
void fence_for_products() {
    Registers& registers = fiber().watched.registers;
    registers.are_fenced = true;
    for (unsigned char& word : registers.words)
        if (word == TOUCHED) word = UNTOUCHED;
}
// For all lanes at once.
void finish_products(Warp& w, size_t pending) {
    const size_t all = w.watched.groups, done = all > pending ? all - pending : 0;
    for (Fiber* f : w.lanes) {
        WatchedThread& t = f->watched;
        Registers& registers = t.registers;
        auto& in_use = registers.in_use;
        for (const auto& one : in_use) std::memset(registers.at(one.p), UNTOUCHED, one.bytes / 4);
        in_use.erase(std::remove_if(in_use.begin(), in_use.end(),
                                    [&](const auto& one) { return one.group < done; }),
                     in_use.end());
        for (const auto& one : in_use) std::memset(registers.at(one.p), IN_USE, one.bytes / 4);
    }
    auto reads = std::make_shared<Knowledge>();
    raise(reads->known, w.watched.number, Epoch(done));
    for (Fiber* f : w.lanes) f->watched.knows = cluster().watched.join(f->watched.knows, reads);
}

}  // namespace emulator

#endif
