/* vmm.c - virtual memory management: reserve addresses, create memory, map memory at addresses.
 *
 * torch uses it for PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True. Each piece of memory has its own memfd, so that it can be
 * exported as a file descriptor.
 */
#include "sim.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#define MEMFD_NAME "devguard-vmm:"
#define RESERVED (MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE)

struct piece {
    int fd, device; /* physical */
    size_t length;  /* 0: imported, accounted for by its exporter */
    int references;
};

struct reservation { /* addresses for the program, then as many for the aliases: adjacent memory has adjacent aliases */
    char *address;
    size_t length;
    struct reservation *next;
};
static struct reservation *reservations;

static struct reservation *reservation_of(char *pointer)
{
    struct reservation *each = reservations;
    while (each && (pointer < each->address || pointer >= each->address + each->length)) each = each->next;
    return each;
}

static struct piece *piece_of(const struct sim_range *range)
{
    struct piece *piece;
    memcpy(&piece, range->key, sizeof piece);
    return piece;
}

/* Returns the device of a memfd of this simulation, from its name; -1: any other file. */
static int device_of_fd(int fd)
{
    char link[64], target[128];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, target, sizeof target - 1);
    if (length < 0) return -1;
    target[length] = 0;
    char *name = strstr(target, MEMFD_NAME);
    return name ? atoi(name + strlen(MEMFD_NAME)) : -1;
}

API CUresult cuMemGetAllocationGranularity(size_t *granularity, const CUmemAllocationProp *properties,
                                           CUmemAllocationGranularity_flags option)
{
    *granularity = GRANULE;
    return CUDA_SUCCESS;
}
API CUresult cuMemAddressReserve(CUdeviceptr *pointer, size_t length, size_t alignment, CUdeviceptr wish, unsigned long long flags)
{
    DRIVER_CONTEXT();
    struct reservation *made = calloc(1, sizeof *made);
    char *address = mmap(NULL, 2 * length, PROT_NONE, RESERVED, -1, 0);
    if (!made || address == MAP_FAILED) {
        free(made);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    pthread_mutex_lock(&sim_lock);
    *made = (struct reservation){ address, length, reservations };
    reservations = made;
    pthread_mutex_unlock(&sim_lock);
    *pointer = (CUdeviceptr)address;
    return CUDA_SUCCESS;
}
API CUresult cuMemAddressFree(CUdeviceptr pointer, size_t length)
{
    CUresult error = CUDA_ERROR_INVALID_VALUE;
    pthread_mutex_lock(&sim_lock);
    for (struct reservation **link = &reservations; *link; link = &(*link)->next) {
        struct reservation *gone = *link;
        if (gone->address != (char *)pointer || gone->length != length) continue;
        munmap(gone->address, 2 * length);
        *link = gone->next;
        free(gone);
        error = CUDA_SUCCESS;
        break;
    }
    pthread_mutex_unlock(&sim_lock);
    return error;
}

API CUresult cuMemCreate(CUmemGenericAllocationHandle *handle, size_t length, const CUmemAllocationProp *properties,
                         unsigned long long flags)
{
    int ordinal = properties->location.id;
    DRIVER_DEVICE(ordinal);
    sim_call = __func__;
    CUresult error = (CUresult)sim_open_context(ordinal);
    if (error) return error;
    int physical = sim_visible[ordinal];
    if (sim_used_on(physical) + length > sim_memory) return CUDA_ERROR_OUT_OF_MEMORY;
    struct piece *piece = calloc(1, sizeof *piece);
    char name[32];
    snprintf(name, sizeof name, MEMFD_NAME "%d", physical);
    if (!piece) return CUDA_ERROR_OUT_OF_MEMORY;
    *piece = (struct piece){ memfd_create(name, MFD_CLOEXEC), physical, length, 1 };
    if (piece->fd < 0 || ftruncate(piece->fd, length)) {
        if (piece->fd >= 0) close(piece->fd);
        free(piece);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    sim_account(physical, length);
    sim_log("%d cuMemCreate bytes=%zu", physical, length);
    *handle = (CUmemGenericAllocationHandle)(uintptr_t)piece;
    return CUDA_SUCCESS;
}
API CUresult cuMemRelease(CUmemGenericAllocationHandle handle)
{
    DRIVER_INITIALISED();
    struct piece *piece = (struct piece *)(uintptr_t)handle;
    pthread_mutex_lock(&sim_lock);
    if (!--piece->references) {
        sim_account(piece->device, -(int64_t)piece->length);
        sim_log("%d cuMemRelease", piece->device);
        close(piece->fd);
        free(piece);
    }
    pthread_mutex_unlock(&sim_lock);
    return CUDA_SUCCESS;
}

API CUresult cuMemMap(CUdeviceptr pointer, size_t length, size_t offset, CUmemGenericAllocationHandle handle, unsigned long long flags)
{
    DRIVER_INITIALISED();
    struct piece *piece = (struct piece *)(uintptr_t)handle;
    CUresult error = CUDA_ERROR_INVALID_VALUE;
    pthread_mutex_lock(&sim_lock);
    char *address = (char *)pointer;
    struct reservation *place = reservation_of(address);
    if (place && address + length <= place->address + place->length) {
        char *alias = address + place->length;
        int fixed = MAP_SHARED | MAP_FIXED;
        struct sim_range *range = NULL;
        if (mmap(alias, length, PROT_READ | PROT_WRITE, fixed, piece->fd, offset) != MAP_FAILED &&
            mmap(address, length, PROT_NONE, fixed, piece->fd, offset) != MAP_FAILED)
            range = sim_add_range(RANGE_VMM, address, alias, length, piece->device);
        if (range) {
            memcpy(range->key, &piece, sizeof piece);
            piece->references++;
        }
        error = range ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
    }
    pthread_mutex_unlock(&sim_lock);
    return error;
}
API CUresult cuMemUnmap(CUdeviceptr pointer, size_t length)
{
    DRIVER_INITIALISED();
    pthread_mutex_lock(&sim_lock);
    struct sim_range *range;
    while ((range = sim_find_range((void *)pointer)) && range->kind == RANGE_VMM) {
        struct piece *piece = piece_of(range);
        size_t done = range->length;
        mmap(range->alias, range->length, PROT_NONE, RESERVED | MAP_FIXED, -1, 0);
        mmap(range->address, range->length, PROT_NONE, RESERVED | MAP_FIXED, -1, 0);
        sim_remove_range(range);
        cuMemRelease((CUmemGenericAllocationHandle)(uintptr_t)piece);
        if (done >= length) break;
        pointer += done;
        length -= done;
    }
    pthread_mutex_unlock(&sim_lock);
    return CUDA_SUCCESS;
}
API CUresult cuMemSetAccess(CUdeviceptr pointer, size_t length, const CUmemAccessDesc *access, size_t count)
{
    return CUDA_SUCCESS;
}

API CUresult cuMemExportToShareableHandle(void *out, CUmemGenericAllocationHandle handle, CUmemAllocationHandleType type,
                                          unsigned long long flags)
{
    if (type != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) return CUDA_ERROR_NOT_SUPPORTED;
    *(int *)out = fcntl(((struct piece *)(uintptr_t)handle)->fd, F_DUPFD_CLOEXEC, 0);
    return *(int *)out < 0 ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
API CUresult cuMemImportFromShareableHandle(CUmemGenericAllocationHandle *handle, void *os_handle, CUmemAllocationHandleType type)
{
    DRIVER_CONTEXT();
    int fd = fcntl((int)(intptr_t)os_handle, F_DUPFD_CLOEXEC, 0);
    int physical = fd < 0 ? -1 : device_of_fd(fd);
    struct piece *piece = physical < 0 ? NULL : calloc(1, sizeof *piece);
    if (!piece) {
        if (fd >= 0) close(fd);
        return CUDA_ERROR_INVALID_VALUE;
    }
    *piece = (struct piece){ fd, physical, 0, 1 };
    sim_me->ipc_opens[physical]++;
    sim_log("%d cuMemImport mem=%d", CURRENT, physical);
    *handle = (CUmemGenericAllocationHandle)(uintptr_t)piece;
    return CUDA_SUCCESS;
}
API CUresult cuMemRetainAllocationHandle(CUmemGenericAllocationHandle *handle, void *pointer)
{
    pthread_mutex_lock(&sim_lock);
    struct sim_range *range = sim_find_range(pointer);
    struct piece *piece = range && range->kind == RANGE_VMM ? piece_of(range) : NULL;
    if (piece) piece->references++;
    pthread_mutex_unlock(&sim_lock);
    *handle = (CUmemGenericAllocationHandle)(uintptr_t)piece;
    return piece ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
API CUresult cuMemGetAllocationPropertiesFromHandle(CUmemAllocationProp *properties, CUmemGenericAllocationHandle handle)
{
    memset(properties, 0, sizeof *properties);
    properties->type = CU_MEM_ALLOCATION_TYPE_PINNED;
    properties->location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    properties->location.id = sim_ordinal_of(((struct piece *)(uintptr_t)handle)->device);
    return CUDA_SUCCESS;
}
