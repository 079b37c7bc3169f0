/* sim.h - declarations shared by the files of the simulated CUDA.
 *
 * The files are built as libcudart.so.<major>: the CUDA runtime, the driver API and NVML for N devices that do not exist.
 * libcuda.so.1 and libnvidia-ml.so.1 are empty libraries that depend on it. Every stream does its work immediately and in
 * order, so all work is finished when a program waits for it. Kernels do not run, except contiguous fills (kernels.c).
 *
 * A "physical" index counts the simulated GPUs of the machine; an "ordinal" counts the GPUs that CUDA_VISIBLE_DEVICES shows.
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

/* One process. The record stays readable after the process has died. devguard/simgpu/records.py reads this layout. */
struct sim_process {
    int32_t pid;
    uint32_t devices;  /* the number of simulated GPUs for this process */
    uint64_t serial;   /* rises with every process that starts */
    uint64_t started;  /* its start time in clock ticks since boot: detects a reused pid */
    uint32_t contexts; /* bit i: it holds, or held when it ended, a primary context on physical device i */
    uint32_t reserved;
    char command[COMMAND_LENGTH]; /* its command line, words separated by NUL */
    uint64_t bytes[MAX_DEVICES];  /* device memory that it holds, or held when it ended, without contexts */
    uint64_t peak[MAX_DEVICES];
    uint64_t allocations[MAX_DEVICES];
    uint64_t launches[MAX_DEVICES];
    uint64_t ipc_opens[MAX_DEVICES]; /* opened IPC memory handles, by the device of the memory */
};

#define STATE_MAGIC "DGSIMGPU"
#define STATE_VERSION 1
struct sim_state {
    char magic[8];
    uint32_t version, slots, slot_size;
    uint32_t taken; /* the number of slots that were ever used; these come first */
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
cudaError_t sim_initialise(void);         /* the work of cuInit; every runtime call does it too */
int sim_initialised(void);                /* whether this process did so; its parent before a fork does not count */
int sim_alive(const struct sim_process *process);
uint64_t sim_used_on(int physical);       /* bytes taken on a device by all live processes, contexts included */
int sim_ordinal_of(int physical);         /* -1: not visible here */
void sim_uuid(int physical, unsigned char uuid[16]);
void sim_uuid_text(int physical, char text[48]);

/* ---- the calling thread ---- */
extern __thread int sim_current;           /* current device, an ordinal */
extern __thread int sim_bound;             /* ordinal of the primary context bound to this thread; -1: none */
extern __thread cudaError_t sim_last_error;
extern __thread const char *sim_call;      /* the current API call, for the log */

cudaError_t sim_fail(cudaError_t error);   /* stores and logs an error, and returns it */
#define CURRENT (sim_visible[sim_current]) /* the current device's physical index */

/* Starts a call that needs the driver but no context. */
#define NEEDS_DRIVER()                            \
    do {                                          \
        cudaError_t error_ = sim_initialise();    \
        if (error_) return sim_fail(error_);      \
    } while (0)
/* Starts a call that opens the current device's primary context, unless it is open, and binds it to the thread. */
#define NEEDS_CONTEXT()                                    \
    do {                                                   \
        sim_call = __func__;                               \
        cudaError_t error_ = sim_open_context(sim_current); \
        if (error_) return sim_fail(error_);               \
        sim_bound = sim_current;                           \
    } while (0)
/* The same for driver calls, which do not store errors and never initialise the driver. */
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
struct sim_range { /* an address range not from cudaMalloc: pinned host memory, opened IPC memory, a VMM mapping */
    char *address, *alias;
    size_t length;
    int device; /* physical */
    int kind, references;
    unsigned char key[64]; /* identifies the range; its contents depend on the kind */
};
enum { RANGE_PINNED = 1, RANGE_REGISTERED, RANGE_IPC, RANGE_VMM };

cudaError_t sim_open_context(int ordinal);
/* Called after a context was opened, without any lock, if a library in the process defines it (devguard/tracing). */
API __attribute__((weak)) void devguard_context_opened(int ordinal, const unsigned char uuid[16], const char *call);
int sim_has_context(int physical);
int sim_memory_fd(int physical);
int sim_device_of(const void *pointer);                   /* physical, if the pointer lies in a cudaMalloc arena, else -1 */
char *sim_arena(int physical);                            /* the start of that arena */
struct sim_block *sim_find_block(int physical, const void *pointer);
struct sim_range *sim_find_range(const void *pointer);
struct sim_range *sim_find_key(int kind, const void *key, size_t length);
struct sim_range *sim_add_range(int kind, char *address, char *alias, size_t length, int device); /* NULL: table full */
void sim_remove_range(struct sim_range *range);
char *sim_translate(const void *pointer, size_t length, int *device); /* a readable address; NULL: no such memory */
cudaError_t sim_allocate(void **pointer, size_t length);
void sim_account(int physical, int64_t bytes);            /* bytes > 0 counts as one allocation */
cudaError_t sim_copy(void *target, const void *source, size_t length, const char *how);

/* ---- streams.c ---- */
int sim_stream_device(cudaStream_t stream);               /* physical */

int sim_exportable_event(cudaEvent_t event, int *physical); /* whether processes can share it */
cudaEvent_t sim_imported_event(int physical);

/* ---- devices.c ---- */
int sim_attribute(int attribute, int physical);
void sim_device_name(int physical, char *text, size_t length);

#endif
