/* sim.h - what the files of the simulated CUDA share.
 *
 * Together they are built as libcudart.so.<major>: the CUDA runtime, the driver API and NVML for N devices that do not exist.
 * libcuda.so.1 and libnvidia-ml.so.1 are empty libraries that need this one. Every stream runs at once and in order, so
 * everything is finished when it is asked for. Kernels do not run, contiguous fills apart (kernels.c).
 *
 * A "physical" index counts the simulated GPUs of the machine; an "ordinal" counts those that CUDA_VISIBLE_DEVICES shows.
 */
#ifndef DEVGUARD_SIM_H
#define DEVGUARD_SIM_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

#define API __attribute__((visibility("default")))
#define MAX_DEVICES 16
#define MAX_PROCESSES 512
#define COMMAND_LENGTH 256
#define GRANULE ((size_t)2 << 20) /* the driver hands out device memory in pages of 2 MiB */
#define ALIGN_UP(x, a) (((x) + (a) - 1) / (a) * (a))
#define COUNT(array) (sizeof(array) / sizeof *(array))

/* ---- state.c: settings, log, the state file that all processes share ---- */

/* One process. It stays readable after the process has died. devguard/simgpu/records.py reads this layout. */
struct sim_process {
    int32_t pid;
    uint32_t devices;  /* simulated GPUs that this process was given */
    uint64_t serial;   /* rises with every process that starts */
    uint64_t started;  /* its start time in clock ticks since boot: tells a reused pid */
    uint32_t contexts; /* bit i: it holds, or held at its end, a primary context on physical device i */
    uint32_t reserved;
    char command[COMMAND_LENGTH]; /* its command line, words separated by NUL */
    uint64_t bytes[MAX_DEVICES];  /* device memory that it holds, or held at its end; contexts not counted */
    uint64_t peak[MAX_DEVICES];
    uint64_t allocations[MAX_DEVICES];
    uint64_t launches[MAX_DEVICES];
    uint64_t ipc_opens[MAX_DEVICES]; /* opened IPC memory handles, by the device that the memory is on */
};

#define STATE_MAGIC "DGSIMGPU"
#define STATE_VERSION 1
struct sim_state {
    char magic[8];
    uint32_t version, slots, slot_size;
    uint32_t taken; /* slots that were ever used; they come first */
    uint64_t memory, context_bytes, serial;
    struct sim_process process[MAX_PROCESSES];
};

extern struct sim_state *sim_state;
extern struct sim_process *sim_me; /* this process; set once CUDA is initialised */
extern uint64_t sim_memory, sim_context_bytes;
extern int sim_physical_count, sim_visible_count, sim_visible[MAX_DEVICES];
extern int sim_capability_major, sim_capability_minor;
extern pthread_mutex_t sim_lock; /* recursive; guards the tables of this process */

void sim_log(const char *format, ...) __attribute__((format(printf, 1, 2)));
cudaError_t sim_initialise(void);         /* what cuInit does; every runtime call does it too */
int sim_initialised(void);                /* has this very process (not the one it was forked from) done so? */
int sim_alive(const struct sim_process *process);
uint64_t sim_used_on(int physical);       /* bytes taken on a device by all live processes, contexts included */
int sim_ordinal_of(int physical);         /* -1: not visible here */
void sim_uuid(int physical, unsigned char uuid[16]);
void sim_uuid_text(int physical, char text[48]);

/* ---- the calling thread ---- */
extern __thread int sim_current;           /* current device, an ordinal */
extern __thread int sim_bound;             /* ordinal whose primary context this thread has bound; -1: none */
extern __thread cudaError_t sim_last_error;
extern __thread const char *sim_call;      /* the API call that is running, for the log */

cudaError_t sim_fail(cudaError_t error);   /* remembers and logs an error, and returns it */
#define CURRENT (sim_visible[sim_current]) /* the current device's physical index */

/* Entering a call that needs the driver, but no context. */
#define NEEDS_DRIVER()                            \
    do {                                          \
        cudaError_t error_ = sim_initialise();    \
        if (error_) return sim_fail(error_);      \
    } while (0)
/* Entering a call that opens the current device's primary context, and binds it to the thread, if that was not done. */
#define NEEDS_CONTEXT()                                    \
    do {                                                   \
        sim_call = __func__;                               \
        cudaError_t error_ = sim_open_context(sim_current); \
        if (error_) return sim_fail(error_);               \
        sim_bound = sim_current;                           \
    } while (0)
/* The same for driver calls, whose errors are not remembered and which never initialise the driver by themselves. */
#define DRIVER_INITIALISED()                                      \
    do {                                                          \
        if (!sim_initialised()) return CUDA_ERROR_NOT_INITIALIZED; \
    } while (0)
#define DRIVER_DEVICE(ordinal)                                                          \
    do {                                                                                \
        DRIVER_INITIALISED();                                                           \
        if ((ordinal) < 0 || (ordinal) >= sim_visible_count) return CUDA_ERROR_INVALID_DEVICE; \
    } while (0)
#define DRIVER_CONTEXT()                                              \
    do {                                                              \
        DRIVER_INITIALISED();                                         \
        sim_call = __func__;                                          \
        CUresult error_ = (CUresult)sim_open_context(sim_current);    \
        if (error_) return error_;                                    \
        sim_bound = sim_current;                                      \
    } while (0)
#define VALID_ORDINAL(ordinal)                                                   \
    do {                                                                         \
        if ((ordinal) < 0 || (ordinal) >= sim_visible_count) return sim_fail(cudaErrorInvalidDevice); \
    } while (0)

/* ---- memory.c: contexts and device memory ---- */
struct sim_block {
    size_t offset, length;
};
struct sim_range { /* an address range that is no cudaMalloc: pinned host memory, opened IPC memory, a VMM mapping */
    char *address, *alias;
    size_t length;
    int device; /* physical */
    int kind, references;
    unsigned char key[64]; /* whose identity depends on the kind */
};
enum { RANGE_PINNED = 1, RANGE_REGISTERED, RANGE_IPC, RANGE_VMM };

cudaError_t sim_open_context(int ordinal);
/* Called after a context was opened, without any lock, if some library of the process defines it (devguard/tracing). */
API __attribute__((weak)) void devguard_context_opened(int ordinal, const unsigned char uuid[16], const char *call);
int sim_has_context(int physical);
int sim_memory_fd(int physical);
int sim_device_of(const void *pointer);                   /* physical, if it lies in a cudaMalloc arena, else -1 */
char *sim_arena(int physical);                            /* where that arena begins */
struct sim_block *sim_find_block(int physical, const void *pointer);
struct sim_range *sim_find_range(const void *pointer);
struct sim_range *sim_find_key(int kind, const void *key, size_t length);
struct sim_range *sim_add_range(int kind, char *address, char *alias, size_t length, int device); /* NULL: table full */
void sim_remove_range(struct sim_range *range);
char *sim_translate(const void *pointer, size_t length, int *device); /* what this process can read; NULL: no such memory */
cudaError_t sim_allocate(void **pointer, size_t length);
void sim_account(int physical, int64_t bytes);            /* bytes > 0 counts as one allocation */
cudaError_t sim_copy(void *target, const void *source, size_t length, const char *how);

/* ---- streams.c ---- */
int sim_stream_device(cudaStream_t stream);               /* physical */

int sim_exportable_event(cudaEvent_t event, int *physical); /* may it be shared between processes? */
cudaEvent_t sim_imported_event(int physical);

/* ---- devices.c ---- */
int sim_attribute(int attribute, int physical);
void sim_device_name(int physical, char *text, size_t length);

#endif
