// MEGASEQ_CLONES before a function: one body, compiled for several instruction sets, the best chosen at load time.
#pragma once

// GCC's mechanism, which needs the GNU C library's indirect functions; elsewhere the function is compiled once.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__)
#include <features.h>
#endif
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__)
#define MEGASEQ_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define MEGASEQ_CLONES
#endif
