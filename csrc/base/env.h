// The one table of settings. Nothing else in the core reads the environment; docs/env.md is generated from `settings()`.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace roundel::env {

struct Setting {
  const char* name;
  const char* fallback;
  const char* doc;
};

const std::vector<Setting>& settings();

// The value of a setting of the table, or its default. CHECKs that the name is in the table.
std::string text(const char* name);

// Parsed; InvalidArgument says which variable holds what when it is no number or out of [low, high].
double number(const char* name, double low, double high);

// Bytes with an optional suffix K, M or G (powers of 1024).
uint64_t bytes(const char* name);

// True for 1/true/on/yes, false for 0/false/off/no.
bool flag(const char* name);

}  // namespace roundel::env
