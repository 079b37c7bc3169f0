/* lookup.c - looks up symbols with the C library's own dlsym, although driver.c exports a dlsym before it. */
#include "trace.h"

#include <dlfcn.h>

trace_dlsym_function trace_real_dlsym(void)
{
    static trace_dlsym_function found;
    static const char *const versions[] = { "GLIBC_2.34", "GLIBC_2.17", "GLIBC_2.2.5" };
    trace_dlsym_function result = __atomic_load_n(&found, __ATOMIC_RELAXED);
    for (size_t i = 0; !result && i < sizeof versions / sizeof *versions; i++)
        result = (trace_dlsym_function)dlvsym(RTLD_NEXT, "dlsym", versions[i]);
    __atomic_store_n(&found, result, __ATOMIC_RELAXED);
    return result;
}

void *trace_find(void *handle, const char *name)
{
    trace_dlsym_function real = trace_real_dlsym();
    void *found = real ? real(handle, name) : NULL;
    return found;
}
