#include <cstring>

#include "check.h"

// Runs every test whose name contains the argument, or without one all but those for a soak; exits 1 if a check failed or
// nothing ran.
int main(int argc, char** argv) {
  using namespace roundel::test;
  int ran = 0;
  for (const Case& test : cases()) {
    if (argc > 1 && std::strstr(test.name, argv[1]) == nullptr) continue;
    if (argc == 1 && std::strstr(test.name, "soak") != nullptr) continue;
    const int before = failures();
    test.run();
    ++ran;
    std::printf("%s %s\n", failures() == before ? "ok  " : "FAIL", test.name);
  }
  std::printf("%d tests, %d failed checks\n", ran, failures());
  return failures() == 0 && ran > 0 ? 0 : 1;
}
