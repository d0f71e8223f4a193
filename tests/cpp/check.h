// The C++ tests' few lines of framework: TEST(name) { CHECK(...); }, one executable, a name filter as argument.
#pragma once

#include <cmath>
#include <cstdio>
#include <sstream>
#include <string>
#include <vector>

namespace roundel::test {

struct Case {
  const char* name;
  void (*run)();
};

inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

inline int& failures() {
  static int count = 0;
  return count;
}

struct Register {
  Register(const char* name, void (*run)()) { cases().push_back({name, run}); }
};

inline void fail(const char* file, int line, const std::string& what) {
  ++failures();
  std::fprintf(stderr, "%s:%d: %s\n", file, line, what.c_str());
}

template <class A, class B>
void check_equal(const A& a, const B& b, const char* text, const char* file, int line) {
  if (a == b) return;
  std::ostringstream out;
  out << text << ": " << a << " is not " << b;
  fail(file, line, out.str());
}

}  // namespace roundel::test

#define TEST(name)                                                            \
  static void test_##name();                                                  \
  static const ::roundel::test::Register register_##name(#name, test_##name); \
  static void test_##name()

#define CHECK(condition)                                                     \
  do {                                                                       \
    if (!(condition)) ::roundel::test::fail(__FILE__, __LINE__, #condition); \
  } while (0)

#define CHECK_EQ(a, b) ::roundel::test::check_equal((a), (b), #a " == " #b, __FILE__, __LINE__)

#define CHECK_THROWS(expression, Type)                                                      \
  do {                                                                                      \
    bool thrown = false;                                                                    \
    try {                                                                                   \
      (void)(expression);                                                                   \
    } catch (const Type&) {                                                                 \
      thrown = true;                                                                        \
    }                                                                                       \
    if (!thrown) ::roundel::test::fail(__FILE__, __LINE__, #expression " threw no " #Type); \
  } while (0)
