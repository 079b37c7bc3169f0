/* trace.h - what the files of the context tracer share.
 *
 * Together they are one library for LD_PRELOAD. It writes a record for each CUDA context that the process opens: driver.c sees
 * it happen, native.c and python.c find out who did it, record.c writes it down. It opens no context, starts no CUDA and needs
 * the headers of neither CUDA nor Python; whatever it cannot find out it leaves out. A record must never stop the program.
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
    char thread[96];     /* the name that Python's threading knows; empty: none */
    int frames, omitted;
    size_t used;
    char text[48 << 10]; /* file NUL line NUL function NUL, for each frame, the innermost first */
};

struct native_stack {
    char call[96];          /* the C call that opened the context */
    char asker[512];        /* path of the library that made this call */
    char function[512];     /* the function of it; empty: not known */
    char libraries[1024];   /* file names from the asker outwards, each once in a row, with NUL between; ends with two */
    char thread[32];        /* the kernel's name of the thread */
    char command[256];
    pid_t pid, tid;
};

struct context {
    const char *kind; /* "primary" or "created" (cuCtxCreate) */
    int device;       /* an ordinal of this process */
    struct native_stack native;
    struct python_stack python;
};

/* driver.c */
void *trace_find(void *handle, const char *name); /* the real dlsym; sees RTLD_DEFAULT and RTLD_NEXT as this library does */

/* native.c */
void trace_native(struct native_stack *stack, const char *call);
int trace_is_own(const void *address);
const char *trace_file_name(const char *path);

/* python.c */
void trace_python(struct python_stack *stack);

/* record.c: reports that this thread has opened a context; the uuid may be NULL */
void trace_report(const char *kind, int device, const unsigned char *uuid, const char *call);

#endif
