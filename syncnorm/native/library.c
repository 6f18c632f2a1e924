/* What Python asks of the library before it uses it: which sources it was made of, and what the CPU supports. */

const char *sources(void) { return SOURCES; }

/* Whether the CPU has the instructions of x86-64-v3. */
int supports_v3(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
#else
    return 0;
#endif
}
