// The smallest test framework that serves: CHECK counts, prints what failed, and finish() is main's result.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>

inline int failures = 0, checks = 0;
inline bool stop_at_first = false;
inline std::string context;  // what is being tested, printed with a failure

inline bool check(bool ok, const char* what, const char* file, int line) {
  ++checks;
  if (ok) return true;
  if (++failures <= 20) std::printf("%s:%d: failed: %s\n    %s\n", file, line, what, context.c_str());
  if (stop_at_first) std::exit(1);
  return false;
}
#define CHECK(condition) check((condition), #condition, __FILE__, __LINE__)

inline int finish(const char* name) {
  std::printf("%s: %d checks, %d failed\n", name, checks, failures);
  return failures == 0 ? 0 : 1;
}
