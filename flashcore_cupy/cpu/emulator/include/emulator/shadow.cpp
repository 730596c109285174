// shadow.cpp - what is remembered of a line's accesses, and when two of them are at odds.
#include <emulator/shadow.hpp>

#ifdef EMULATOR_CHECK

namespace emulator {

static bool is_own(const Record& before, const Access& now) {
    return before.cluster == now.cluster && before.warp == now.thread / 32 &&
           before.lanes == 1u << now.thread % 32;
}

// Whether the record is among `epochs`: each of its lanes, or one if they were together. A thread
// need not be told of itself.
static bool is_among(const Epochs& epochs, const Record& before, size_t self) {
    for (uint32_t lanes = before.lanes; lanes; lanes &= lanes - 1) {
        const size_t who = size_t(before.warp) * 32 + size_t(__builtin_ctz(lanes));
        const bool is_known = who == self || at(epochs, who) >= before.epoch;
        if (is_known == before.is_together) return is_known;
    }
    return !before.is_together;
}

static bool comes_before(const Record& before, const Access& now) {
    if (before.in_flight) return now.completes && is_own(before, now);
    if (before.cluster == now.cluster) return is_among(now.knows->known, before, now.thread);
    const auto found = now.knows->others.find(before.cluster);
    return found != now.knows->others.end() && is_among(found->second, before, SIZE_MAX);
}
static Wrong between(const Record& before, const Access& now) {
    if (!comes_before(before, now)) return Wrong::RACE;
    if (now.is_async && !before.is_async && !is_among(now.knows->shown, before, SIZE_MAX))
        return Wrong::NO_FENCE;
    return Wrong::NOTHING;
}

// Whether both are accesses of one kind, in one epoch of one warp.
static bool is_alike(const Record& before, const Access& now) {
    return before.warp == now.who / 32 && before.epoch == now.epoch &&
           before.cluster == now.cluster && before.writes == now.writes &&
           before.is_async == now.is_async && before.is_atomic == now.is_atomic &&
           before.is_together == now.is_together && before.in_flight == now.in_flight;
}

bool Line::has_read(uint16_t bytes, const Access& now) const {
    if (now.writes || now.completes) return false;
    const uint32_t lanes = now.is_together ? ~0u : 1u << now.who % 32;
    for (const Record& r : records_)
        if (is_alike(r, now) && (r.lanes & lanes) == lanes && !(bytes & ~r.bytes)) return true;
    return false;
}

Finding Line::check(uint16_t bytes, const Access& now) const {
    if (!now.writes && (bytes & ~written_))
        return {Wrong::UNWRITTEN, __builtin_ctz(bytes & ~written_), {}};
    Finding found;
    // Of bytes that several have written, all of them the same value, a reader knows it from one.
    uint16_t wrong = 0, right = 0;
    for (const Record& r : records_) {
        const uint16_t both = r.bytes & bytes;
        if (!both || !(r.writes || now.writes) || (r.is_atomic && now.is_atomic)) continue;
        const Wrong what = between(r, now);
        if (what == Wrong::NOTHING) {
            right |= r.writes ? both : 0;
            continue;
        }
        wrong |= both;
        if (found.what == Wrong::NOTHING) found = {what, __builtin_ctz(both), r};
    }
    if (!now.writes) wrong &= uint16_t(~right);
    return wrong ? found : Finding();
}

Finding Line::check_end(size_t first_own, size_t end_own, const Access& end) const {
    for (const Record& r : records_) {
        const bool is_own = r.warp * 32 >= first_own && r.warp * 32 < end_own && !r.is_async;
        if (!is_own && !comes_before(r, end)) return {Wrong::RACE, __builtin_ctz(r.bytes), r};
    }
    return {};
}

void Line::remember(uint16_t bytes, const Access& now, bool changes) {
    const uint32_t lanes = now.is_together ? ~0u : 1u << now.who % 32;
    bool is_recorded = false;
    size_t kept = 0;
    for (size_t i = 0; i < records_.size(); ++i) {
        Record r = records_[i];
        if (r.bytes & bytes) {
            // What comes after the new access comes after those that it takes the place of.
            if ((now.writes && changes) || (now.completes && r.in_flight && is_own(r, now)))
                r.bytes &= uint16_t(~bytes);
            else if (!r.writes && !now.writes && !r.in_flight && !now.in_flight &&
                     r.is_together == now.is_together && r.cluster == now.cluster &&
                     r.warp == now.who / 32 && r.epoch < now.epoch && !(r.bytes & ~bytes))
                r.lanes &= ~lanes;
        }
        if (!is_recorded && r.bytes && is_alike(r, now)) {
            if (r.lanes == lanes)
                r.bytes |= bytes;
            else if (r.bytes == bytes)
                r.lanes |= lanes;
            is_recorded = (r.lanes & lanes) == lanes && !(bytes & ~r.bytes);
        }
        if (r.bytes && r.lanes) records_[kept++] = r;
    }
    records_.resize(kept);
    if (!is_recorded)
        records_.push_back({now.cluster, uint32_t(now.who / 32), lanes, now.epoch, bytes,
                            now.writes, now.is_async, now.is_atomic, now.is_together, now.in_flight,
                            now.place});
    if (now.writes) written_ |= bytes;
}

}  // namespace emulator

#endif
