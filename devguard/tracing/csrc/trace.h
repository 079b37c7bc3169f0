/* trace.h - declarations shared by the files of the context tracer.
 *
 * Together they form one library for LD_PRELOAD that writes a record for each CUDA context the process opens: driver.c detects
 * the opening, record.c writes the record, native.c and python.c collect the stacks, lookup.c finds symbols. In this order,
 * each file calls only later ones, and native.c and python.c do not call each other. The library opens no context, does not
 * initialize CUDA and needs no headers of CUDA or Python; unknown details are left out. A record must never stop the program.
 */
#ifndef DEVGUARD_TRACE_H
#define DEVGUARD_TRACE_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define API __attribute__((visibility("default")))
#define MAX_FRAMES 200

struct python_stack {
    const char *missing; /* why there is no stack; NULL: there is one */
    char thread[96];     /* the name in Python's threading; empty: none */
    int frames, omitted;
    size_t used;
    char text[48 << 10]; /* file NUL line NUL function NUL, for each frame, innermost first */
};

struct native_stack {
    char call[96];          /* the C call that opened the context */
    char asker[512];        /* path of the library that made this call */
    char function[512];     /* the calling function in that library; empty: unknown */
    char libraries[1024];   /* file names from the asker outwards, no adjacent repeats, NUL after each and at the end */
    char thread[32];        /* the kernel's name for the thread */
    char command[256];
    pid_t pid, tid;
};

struct context {
    const char *kind; /* "primary" or "created" (cuCtxCreate) */
    int device;       /* the ordinal in this process */
    struct native_stack native;
    struct python_stack python;
};

/* lookup.c */
typedef void *(*trace_dlsym_function)(void *, const char *);
trace_dlsym_function trace_real_dlsym(void);      /* the C library's dlsym; NULL if it was not found */
void *trace_find(void *handle, const char *name); /* calls it: RTLD_DEFAULT and RTLD_NEXT count from this library */

/* native.c */
void trace_native(struct native_stack *stack, const char *call);
int trace_is_own(const void *address);
const char *trace_file_name(const char *path);

/* python.c */
void trace_python(struct python_stack *stack);

/* record.c: writes the record of a context that this thread has opened; the uuid may be NULL */
void trace_report(const char *kind, int device, const unsigned char *uuid, const char *call);

#endif
