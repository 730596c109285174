// places.hpp - from an address in a kernel's code to the line of the source that it is from.
#pragma once
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

namespace emulator {

// A path from the folder kernels/ on, if it is in there; nothing for the emulator's own files.
inline std::string kernel_file(const std::string& path) {
    if (path.find("/cpu/emulator/include/") != std::string::npos || path.find("??") == 0) return "";
    const size_t at = path.rfind("/kernels/");
    return at == std::string::npos ? path : path.substr(at + 9);
}

// The line of each place, and those that it is inlined at: all of a kernel is one function.
// addr2line, which comes with a compiler, reads them; without it the places are offsets in the
// library.
inline std::map<const void*, std::string> lines_of(const std::vector<const void*>& places) {
    std::map<const void*, std::string> lines;
#ifdef EMULATOR_CHECK
    std::string library, addresses;
    std::map<unsigned long, const void*> at;
    for (const void* place : places) {
        Dl_info info;
        if (!place || lines.count(place) || !dladdr(place, &info)) continue;
        const char* const base = static_cast<const char*>(info.dli_fbase);
        // The call itself lies before the address that it returns to.
        const auto offset = (unsigned long)(static_cast<const char*>(place) - base - 1);
        char text[40];
        snprintf(text, sizeof text, "+0x%lx", offset);
        lines[place] = text;
        at[offset] = place;
        addresses += std::string(" ") + (text + 1);
        library = info.dli_fname;
    }
    FILE* const tool =
        popen(("addr2line -aie '" + library + "'" + addresses + " 2>/dev/null").c_str(), "r");
    if (!tool) return lines;
    char line[4096];
    std::string* of = nullptr;
    while (fgets(line, sizeof line, tool)) {
        if (line[0] == '0' && line[1] == 'x') {
            const auto found = at.find(strtoul(line, nullptr, 16));
            of = found == at.end() ? nullptr : &lines[found->second];
            continue;
        }
        std::string text = line;
        text = kernel_file(text.substr(0, text.find_first_of(" \n")));
        if (!of || text.empty()) continue;
        const bool is_first = (*of)[0] == '+', is_second = of->find(',') == std::string::npos;
        *of = is_first ? text : *of + (is_second ? ", called at " : ", ") + text;
    }
    pclose(tool);
#endif
    return lines;
}
// " at mask.cuh:30"; nothing without debugging information.
inline std::string at_line(const std::map<const void*, std::string>& lines, const void* place) {
    const auto found = lines.find(place);
    return found == lines.end() ? "" : " at " + found->second;
}
inline std::string at_line(const void* place) { return at_line(lines_of({place}), place); }

}  // namespace emulator
