/* ipc.c - device memory and events that another process exported.
 *
 * A handle names the exporter's memfd, which the importer opens through /proc/<pid>/fd. An opened handle is mapped through peer
 * access: the importer gets no context on the exporter's device (SGLang's PR 22662 relies on this).
 */
#include "sim.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#define MEMORY_HANDLE 0xde5c0de0u
#define EVENT_HANDLE 0xde5e0e70u

struct handle { /* travels in the 64 bytes of cudaIpcMemHandle_t and cudaIpcEventHandle_t */
    uint32_t magic;
    int32_t pid, fd, device;
    uint64_t inode; /* distinguishes the memfd from a later file with the same pid and fd */
    uint64_t offset, length;
};

API cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t *out, void *pointer)
{
    NEEDS_CONTEXT();
    pthread_mutex_lock(&sim_lock);
    int physical = sim_device_of(pointer);
    struct sim_block *block = physical >= 0 ? sim_find_block(physical, pointer) : NULL;
    struct stat info;
    if (!block || fstat(sim_memory_fd(physical), &info)) {
        pthread_mutex_unlock(&sim_lock);
        return sim_fail(cudaErrorInvalidValue);
    }
    struct handle handle = { MEMORY_HANDLE, getpid(),      sim_memory_fd(physical), physical,
                             info.st_ino,   block->offset, block->length };
    pthread_mutex_unlock(&sim_lock);
    memset(out, 0, sizeof *out);
    memcpy(out, &handle, sizeof handle);
    sim_log("%d ipcGetMem mem=%d bytes=%zu", CURRENT, physical, (size_t)handle.length);
    return cudaSuccess;
}

static cudaError_t map_exported(const struct handle *handle, void **pointer)
{
    char path[64];
    struct stat info;
    snprintf(path, sizeof path, "/proc/%d/fd/%d", handle->pid, handle->fd);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0) return cudaErrorMapBufferObjectFailed;
    char *address = MAP_FAILED, *alias = MAP_FAILED;
    if (!fstat(fd, &info) && info.st_ino == handle->inode) {
        address = mmap(NULL, handle->length, PROT_NONE, MAP_SHARED, fd, handle->offset);
        alias = mmap(NULL, handle->length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, handle->offset);
    }
    close(fd);
    if (address == MAP_FAILED || alias == MAP_FAILED) return cudaErrorMapBufferObjectFailed;
    struct sim_range *range = sim_add_range(RANGE_IPC, address, alias, handle->length, handle->device);
    if (!range) return cudaErrorMapBufferObjectFailed;
    memcpy(range->key, handle, sizeof *handle);
    sim_me->ipc_opens[handle->device]++;
    *pointer = address;
    return cudaSuccess;
}

API cudaError_t cudaIpcOpenMemHandle(void **pointer, cudaIpcMemHandle_t in, unsigned flags)
{
    NEEDS_CONTEXT();
    struct handle handle;
    memcpy(&handle, &in, sizeof handle);
    if (handle.magic != MEMORY_HANDLE || handle.device < 0 || handle.device >= MAX_DEVICES) return sim_fail(cudaErrorInvalidValue);
    if (handle.pid == getpid()) return sim_fail(cudaErrorDeviceUninitialized); /* as the driver does in the exporting process */
    sim_log("%d ipcOpenMem mem=%d from=%d", CURRENT, handle.device, handle.pid);
    pthread_mutex_lock(&sim_lock);
    struct sim_range *open = sim_find_key(RANGE_IPC, &handle, sizeof handle);
    cudaError_t error = cudaSuccess;
    if (open) {
        open->references++;
        *pointer = open->address;
    } else {
        error = map_exported(&handle, pointer);
    }
    pthread_mutex_unlock(&sim_lock);
    return sim_fail(error);
}

API cudaError_t cudaIpcCloseMemHandle(void *pointer)
{
    NEEDS_CONTEXT();
    pthread_mutex_lock(&sim_lock);
    struct sim_range *range = sim_find_range(pointer);
    int right = range && range->kind == RANGE_IPC;
    if (right) {
        sim_log("%d ipcCloseMem mem=%d refs=%d", CURRENT, range->device, range->references - 1);
        if (!--range->references) {
            munmap(range->address, range->length);
            munmap(range->alias, range->length);
            sim_remove_range(range);
        }
    }
    pthread_mutex_unlock(&sim_lock);
    return sim_fail(right ? cudaSuccess : cudaErrorInvalidValue);
}

API cudaError_t cudaIpcGetEventHandle(cudaIpcEventHandle_t *out, cudaEvent_t event)
{
    NEEDS_CONTEXT();
    struct handle handle = { .magic = EVENT_HANDLE, .pid = getpid() };
    if (!sim_exportable_event(event, &handle.device)) return sim_fail(cudaErrorInvalidResourceHandle);
    memset(out, 0, sizeof *out);
    memcpy(out, &handle, sizeof handle);
    sim_log("%d ipcGetEvent", handle.device);
    return cudaSuccess;
}

API cudaError_t cudaIpcOpenEventHandle(cudaEvent_t *event, cudaIpcEventHandle_t in)
{
    NEEDS_CONTEXT();
    struct handle handle;
    memcpy(&handle, &in, sizeof handle);
    if (handle.magic != EVENT_HANDLE) return sim_fail(cudaErrorInvalidResourceHandle);
    *event = sim_imported_event(handle.device);
    sim_log("%d ipcOpenEvent ev=%d", CURRENT, handle.device);
    return cudaSuccess;
}
