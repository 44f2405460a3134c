// What the kernels of one instruction set are compiled with. A file of kernels sets VECTOR_BYTES, includes
// this and then the kernels between DYNLOSS_TARGET_BEGIN and DYNLOSS_TARGET_END, in the namespace
// INSTRUCTION_SET.
//
// Every header that the kernels need is included here, before the target begins: inline functions of theirs
// must not be compiled for a machine that the program may not run on.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>

#if VECTOR_BYTES == 64
#include <immintrin.h>
#endif

#include "core/cross_entropy_row.h"

#define DYNLOSS_ALWAYS_INLINE_LAMBDA __attribute__((always_inline))

// instruction_set.cpp asks the machine for the same.
#if VECTOR_BYTES == 64
#define INSTRUCTION_SET avx512
#define DYNLOSS_TARGET "avx512f,avx512vl,avx512dq,avx512bw,avx2,fma,f16c,prefer-vector-width=512"
#elif VECTOR_BYTES == 32
#define INSTRUCTION_SET avx2
#define DYNLOSS_TARGET "avx2,fma,f16c"
#else  // which every x86-64 and aarch64 has
#define INSTRUCTION_SET portable
#endif

#define DYNLOSS_PRAGMA(text) _Pragma(#text)
#define DYNLOSS_PRAGMA_OF(...) DYNLOSS_PRAGMA(__VA_ARGS__)  // with macros replaced

#if !defined(DYNLOSS_TARGET)
#define DYNLOSS_TARGET_BEGIN
#define DYNLOSS_TARGET_END
#elif defined(__clang__)
#define DYNLOSS_TARGET_BEGIN \
  DYNLOSS_PRAGMA_OF(clang attribute push(__attribute__((target(DYNLOSS_TARGET))), apply_to = function))
#define DYNLOSS_TARGET_END _Pragma("clang attribute pop")
#else
#define DYNLOSS_TARGET_BEGIN _Pragma("GCC push_options") DYNLOSS_PRAGMA_OF(GCC target(DYNLOSS_TARGET))
#define DYNLOSS_TARGET_END _Pragma("GCC pop_options")
#endif
