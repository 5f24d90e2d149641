// MEMDENSE_SIMD compiles a function once per instruction set; the loader picks the best, so one
// file runs on every x86-64 machine. What the function calls must be inlined into it.
#pragma once

#if defined(__x86_64__) && defined(__gnu_linux__) && (!defined(__clang__) || __clang_major__ >= 17)
#define MEMDENSE_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MEMDENSE_SIMD
#endif
