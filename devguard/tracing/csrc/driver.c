/* driver.c - detects when a context is opened.
 *
 * The driver opens a context in cuDevicePrimaryCtxRetain and cuCtxCreate. Programs reach these functions in three ways, and
 * each way leads to a stub: linking libcuda.so.1 (the functions exported here come first), dlsym, and cuGetProcAddress, which
 * libcudart itself looks up with dlsym. Contexts that the driver opens internally, without these functions, are not detected.
 *
 * Simulated GPUs report their own contexts: they call devguard_context_opened, and after that the stubs report nothing.
 */
#include "trace.h"

#include <dlfcn.h>
#include <string.h>
#include <unistd.h>

/* Every function here takes at most six integers or pointers, which x86-64 and AArch64 pass in registers. Forwarding all six
 * unchanged therefore works for every version of a signature. */
#define PARAMETERS uintptr_t a, uintptr_t b, uintptr_t c, uintptr_t d, uintptr_t e, uintptr_t f
#define ARGUMENTS a, b, c, d, e, f
typedef int (*function)(PARAMETERS);

enum { NOT_INITIALIZED = 3 }; /* CUDA_ERROR_NOT_INITIALIZED */
enum kind { RETAIN, CREATE, CLOSE, LOOKUP, KINDS };
#define SLOTS 6 /* versions of one function */
#define MAX_DEVICES 64

static int simulated;
static pid_t known[MAX_DEVICES]; /* the process that has reported its primary context on this device */

/* ---- the driver's own functions ---- */

static void *in_driver(const char *name)
{
    void *library = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
    if (!library) library = dlopen("libcuda.so.1", RTLD_LAZY);
    return library ? trace_find(library, name) : NULL; /* not closed: the driver stays loaded anyway */
}

static int call_driver(const char *name, uintptr_t a, uintptr_t b, uintptr_t c)
{
    function real = (function)in_driver(name);
    return real ? real(a, b, c, 0, 0, 0) : NOT_INITIALIZED;
}

static int is_active(int device)
{
    unsigned flags = 0;
    int active = 0;
    int error = call_driver("cuDevicePrimaryCtxGetState", (uintptr_t)device, (uintptr_t)&flags, (uintptr_t)&active);
    return !error && active;
}

/* ---- the work of a stub ---- */

static void report(const char *kind, int device, const char *call)
{
    unsigned char uuid[16];
    int error = call_driver("cuDeviceGetUuid_v2", (uintptr_t)uuid, (uintptr_t)device, 0);
    if (error) error = call_driver("cuDeviceGetUuid", (uintptr_t)uuid, (uintptr_t)device, 0);
    trace_report(kind, device, error ? NULL : uuid, call);
}

static void *stub_for(const char *name, void *real);

static int retain(function real, PARAMETERS)
{
    int device = (int)b, traced = device >= 0 && device < MAX_DEVICES;
    int before = traced && is_active(device);
    int error = real(ARGUMENTS);
    /* The exchange lets only one of several concurrent threads report. It compares process ids, because a forked child starts
     * without contexts. */
    if (!error && traced && !before && !__atomic_load_n(&simulated, __ATOMIC_SEQ_CST) &&
        __atomic_exchange_n(&known[device], getpid(), __ATOMIC_SEQ_CST) != getpid())
        report("primary", device, "cuDevicePrimaryCtxRetain");
    return error;
}

static int through(enum kind kind, void *target, PARAMETERS)
{
    function real = (function)target;
    if (!real) return NOT_INITIALIZED;
    if (kind == RETAIN) return retain(real, ARGUMENTS);
    int error = real(ARGUMENTS), device = (int)a;
    if (error) return error;
    if (kind == LOOKUP && a && b && *(void **)b) *(void **)b = stub_for((const char *)a, *(void **)b);
    if (kind == CLOSE && device >= 0 && device < MAX_DEVICES && !is_active(device))
        __atomic_store_n(&known[device], 0, __ATOMIC_SEQ_CST);
    if (kind == CREATE && !__atomic_load_n(&simulated, __ATOMIC_SEQ_CST)) {
        device = -1; /* read from the new context, which is current now */
        if (!call_driver("cuCtxGetDevice", (uintptr_t)&device, 0, 0)) report("created", device, "cuCtxCreate");
    }
    return error;
}

/* ---- stubs for functions that are looked up: one for each real function ---- */

static void *reals[KINDS][SLOTS];

#define STUB(kind, slot)                                                              \
    static int stub_##kind##_##slot(PARAMETERS)                                       \
    {                                                                                 \
        void *real = __atomic_load_n(&reals[kind][slot], __ATOMIC_SEQ_CST);           \
        return through(kind, real, ARGUMENTS);                                        \
    }
#define STUBS(kind) STUB(kind, 0) STUB(kind, 1) STUB(kind, 2) STUB(kind, 3) STUB(kind, 4) STUB(kind, 5)
#define NAMES(kind) \
    { stub_##kind##_0, stub_##kind##_1, stub_##kind##_2, stub_##kind##_3, stub_##kind##_4, stub_##kind##_5 }
STUBS(RETAIN)
STUBS(CREATE)
STUBS(CLOSE)
STUBS(LOOKUP)
static const function stubs[KINDS][SLOTS] = { NAMES(RETAIN), NAMES(CREATE), NAMES(CLOSE), NAMES(LOOKUP) };

/* Compares prefixes: later versions add a suffix to the plain name (_v2). */
static int kind_of(const char *name)
{
    static const char *const names[KINDS] = { "cuDevicePrimaryCtxRetain", "cuCtxCreate", "cuDevicePrimaryCtxRe",
                                              "cuGetProcAddress" };
    for (int kind = 0; kind < KINDS; kind++)
        if (!strncmp(name, names[kind], strlen(names[kind]))) return kind;
    return -1;
}

static void *stub_for(const char *name, void *real)
{
    int kind = kind_of(name);
    if (kind < 0 || trace_is_own(real)) return real;
    for (int slot = 0; slot < SLOTS; slot++) {
        void *there = NULL;
        if (__atomic_compare_exchange_n(&reals[kind][slot], &there, real, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST) ||
            there == real)
            return (void *)stubs[kind][slot];
    }
    return real;
}

static __attribute__((noinline)) void *look_up(void *handle, const char *name, const void *caller)
{
    void *found = trace_find(handle, name);
    Dl_info info;
    int inside = dladdr(caller, &info) && info.dli_fname && !strncmp(trace_file_name(info.dli_fname), "libcuda.so", 10);
    return found && !inside ? stub_for(name, found) : found;
}

/* For RTLD_NEXT and RTLD_DEFAULT the real dlsym derives the caller from its return address, so it must be a tail call. */
API void *dlsym(void *restrict handle, const char *restrict name)
{
    if (handle != RTLD_NEXT && handle != RTLD_DEFAULT && name[0] == 'c' && name[1] == 'u' && kind_of(name) >= 0)
        return look_up(handle, name, __builtin_return_address(0));
    return trace_real_dlsym()(handle, name);
}

/* ---- stubs for programs that link the driver ---- */

#define EXPORT(kind, name)                                                           \
    API int name(PARAMETERS);                                                        \
    API int name(PARAMETERS)                                                         \
    {                                                                                \
        return through(kind, in_driver(#name), ARGUMENTS);                           \
    }
EXPORT(RETAIN, cuDevicePrimaryCtxRetain)
EXPORT(CREATE, cuCtxCreate)
EXPORT(CREATE, cuCtxCreate_v2)
EXPORT(CREATE, cuCtxCreate_v3)
EXPORT(CREATE, cuCtxCreate_v4)
EXPORT(CLOSE, cuDevicePrimaryCtxRelease)
EXPORT(CLOSE, cuDevicePrimaryCtxRelease_v2)
EXPORT(CLOSE, cuDevicePrimaryCtxReset)
EXPORT(CLOSE, cuDevicePrimaryCtxReset_v2)
EXPORT(LOOKUP, cuGetProcAddress)
EXPORT(LOOKUP, cuGetProcAddress_v2)

/* ---- simulated GPUs (devguard/simgpu/csrc/memory.c) ---- */

API void devguard_context_opened(int ordinal, const unsigned char uuid[16], const char *call);
API void devguard_context_opened(int ordinal, const unsigned char uuid[16], const char *call)
{
    __atomic_store_n(&simulated, 1, __ATOMIC_SEQ_CST);
    trace_report("primary", ordinal, uuid, call);
}
