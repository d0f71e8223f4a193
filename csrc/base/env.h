// The one table of settings. Nothing else in the core reads the environment; docs/env.md is generated from `settings()`.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace roundel::env {

// Another library's name for a setting, read where only that one is set. convert: its value in our units, or nothing where it
// does not say anything about the setting.
struct Alias {
  const char* name;
  std::optional<std::string> (*convert)(const std::string&) = nullptr;
};

struct Setting {
  const char* name;
  const char* fallback;
  const char* doc;
  std::vector<Alias> aliases = {};  // the first that says something counts
};

const std::vector<Setting>& settings();

// The value of a setting of the table, or its default. CHECKs that the name is in the table.
std::string text(const char* name);

// What came from aliases, for the log: "HOROVOD_START_TIMEOUT as ROUNDEL_START_TIMEOUT=30".
std::vector<std::string> borrowed();

// Parsed; InvalidArgument says which variable holds what when it is no number or out of [low, high].
double number(const char* name, double low, double high);

// Bytes with an optional suffix K, M or G (powers of 1024).
uint64_t bytes(const char* name);

// True for 1/true/on/yes, false for 0/false/off/no.
bool flag(const char* name);

}  // namespace roundel::env
