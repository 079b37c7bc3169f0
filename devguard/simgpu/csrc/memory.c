/* memory.c - primary contexts, device memory, copies and fills, pinned host memory.
 *
 * The memory of a device is one sparse memfd for each process, mapped twice. The addresses that programs receive have no access
 * rights, so that a host dereference of a device pointer faults, as it does with a GPU. An alias, which only the simulation
 * uses, is readable and writable. Copies and fills are done immediately, so their values are right.
 */
#include "sim.h"

#include <fcntl.h>
#include <sys/mman.h>

#define MAX_BLOCKS 16384
#define MAX_RANGES 16384

struct device_memory {
    int fd;
    char *address, *alias;
    size_t size;
    struct sim_block block[MAX_BLOCKS]; /* sorted by offset */
    int blocks;
};

static struct device_memory *memory[MAX_DEVICES]; /* by physical index; NULL: no context here yet */
static struct sim_range range[MAX_RANGES];
static int ranges;

/* ---- lookup of addresses ---- */

struct sim_range *sim_find_range(const void *pointer)
{
    for (int i = ranges - 1; i >= 0; i--)
        if ((char *)pointer >= range[i].address && (char *)pointer < range[i].address + range[i].length) return &range[i];
    return NULL;
}

struct sim_range *sim_find_key(int kind, const void *key, size_t length)
{
    for (int i = 0; i < ranges; i++)
        if (range[i].kind == kind && !memcmp(range[i].key, key, length)) return &range[i];
    return NULL;
}

struct sim_range *sim_add_range(int kind, char *address, char *alias, size_t length, int device)
{
    if (ranges == MAX_RANGES) return NULL;
    range[ranges] = (struct sim_range){ address, alias, length, device, kind, 1, { 0 } };
    return &range[ranges++];
}

void sim_remove_range(struct sim_range *gone)
{
    *gone = range[--ranges];
}

int sim_device_of(const void *pointer)
{
    for (int i = 0; i < sim_physical_count; i++)
        if (memory[i] && (char *)pointer >= memory[i]->address && (char *)pointer < memory[i]->address + memory[i]->size)
            return i;
    return -1;
}

char *sim_arena(int physical)
{
    return memory[physical]->address;
}

struct sim_block *sim_find_block(int physical, const void *pointer)
{
    struct device_memory *device = memory[physical];
    size_t offset = (char *)pointer - device->address;
    int low = 0, high = device->blocks;
    while (low < high) {
        int middle = (low + high) / 2;
        struct sim_block *block = &device->block[middle];
        if (offset < block->offset) high = middle;
        else if (offset >= block->offset + block->length) low = middle + 1;
        else return block;
    }
    return NULL;
}

char *sim_translate(const void *pointer, size_t length, int *device)
{
    int physical = sim_device_of(pointer);
    *device = physical;
    if (physical >= 0) {
        struct sim_block *block = sim_find_block(physical, pointer);
        size_t offset = (char *)pointer - memory[physical]->address;
        if (!block || offset + length > block->offset + block->length) return NULL;
        return memory[physical]->alias + offset;
    }
    struct sim_range *found = sim_find_range(pointer);
    if (!found || found->kind == RANGE_PINNED || found->kind == RANGE_REGISTERED) return (char *)pointer;
    *device = found->device;
    /* Memory that was mapped piece by piece (vmm.c) is one array to the program. */
    for (struct sim_range *last = found; (char *)pointer + length > last->address + last->length;) {
        struct sim_range *next = sim_find_range(last->address + last->length);
        if (!next || next->kind != RANGE_VMM || next->alias != last->alias + last->length) return NULL;
        last = next;
    }
    return found->alias + ((char *)pointer - found->address);
}

/* ---- contexts ---- */

int sim_has_context(int physical)
{
    return __atomic_load_n(&memory[physical], __ATOMIC_SEQ_CST) != NULL;
}

int sim_memory_fd(int physical)
{
    return memory[physical]->fd;
}

static struct device_memory *map_device(int physical)
{
    struct device_memory *device = calloc(1, sizeof *device);
    char name[48];
    snprintf(name, sizeof name, "devguard-gpu:%d", physical);
    if (!device) return NULL;
    device->size = sim_memory;
    device->fd = memfd_create(name, MFD_CLOEXEC);
    if (device->fd >= 0 && !ftruncate(device->fd, device->size)) {
        int flags = MAP_SHARED | MAP_NORESERVE;
        device->address = mmap(NULL, device->size, PROT_NONE, flags, device->fd, 0);
        device->alias = mmap(NULL, device->size, PROT_READ | PROT_WRITE, flags, device->fd, 0);
        if (device->address != MAP_FAILED && device->alias != MAP_FAILED) return device;
    }
    perror("devguard simulated GPUs: no address space for a device's memory");
    if (device->fd >= 0) close(device->fd);
    free(device);
    return NULL;
}

cudaError_t sim_open_context(int ordinal)
{
    cudaError_t error = sim_initialise();
    if (error) return error;
    if (ordinal < 0 || ordinal >= sim_visible_count) return cudaErrorInvalidDevice;
    int physical = sim_visible[ordinal];
    if (sim_has_context(physical)) return cudaSuccess;
    int opened = 0;
    pthread_mutex_lock(&sim_lock);
    if (!memory[physical]) {
        struct device_memory *device = NULL;
        if (sim_used_on(physical) + sim_context_bytes <= sim_memory) device = map_device(physical);
        if (device) {
            __atomic_fetch_or(&sim_me->contexts, 1u << physical, __ATOMIC_SEQ_CST);
            sim_log("%d ctx_create by=%s", physical, sim_call);
            __atomic_store_n(&memory[physical], device, __ATOMIC_SEQ_CST);
            opened = 1;
        } else {
            error = cudaErrorMemoryAllocation;
        }
    }
    pthread_mutex_unlock(&sim_lock);
    if (opened && devguard_context_opened) {
        unsigned char uuid[16];
        sim_uuid(physical, uuid);
        devguard_context_opened(ordinal, uuid, sim_call);
    }
    return error;
}

/* ---- cudaMalloc and cudaFree ---- */

void sim_account(int physical, int64_t bytes)
{
    uint64_t now = __atomic_add_fetch(&sim_me->bytes[physical], bytes, __ATOMIC_SEQ_CST);
    if (bytes <= 0) return;
    sim_me->allocations[physical]++;
    if (now > sim_me->peak[physical]) sim_me->peak[physical] = now;
}

cudaError_t sim_allocate(void **pointer, size_t wanted)
{
    int physical = CURRENT, i = 0;
    size_t offset = 0;
    struct device_memory *device = memory[physical];
    *pointer = NULL;
    pthread_mutex_lock(&sim_lock);
    int fits = wanted <= sim_memory && device->blocks < MAX_BLOCKS;
    size_t length = fits ? ALIGN_UP(wanted ? wanted : 1, GRANULE) : 0;
    fits = fits && sim_used_on(physical) + length <= sim_memory;
    for (; fits && i < device->blocks && offset + length > device->block[i].offset; i++)
        offset = device->block[i].offset + device->block[i].length; /* first fit */
    if (!fits || offset + length > device->size) {
        pthread_mutex_unlock(&sim_lock);
        sim_log("%d oom bytes=%zu", physical, wanted);
        return cudaErrorMemoryAllocation;
    }
    memmove(&device->block[i + 1], &device->block[i], (device->blocks - i) * sizeof device->block[0]);
    device->block[i] = (struct sim_block){ offset, length };
    device->blocks++;
    sim_account(physical, length);
    *pointer = device->address + offset;
    sim_log("%d malloc bytes=%zu ptr=%p", physical, wanted, *pointer);
    pthread_mutex_unlock(&sim_lock);
    return cudaSuccess;
}

static cudaError_t release(void *pointer)
{
    if (!pointer) return cudaSuccess;
    cudaError_t error = cudaErrorInvalidValue;
    pthread_mutex_lock(&sim_lock);
    int physical = sim_device_of(pointer);
    struct sim_block *block = physical >= 0 ? sim_find_block(physical, pointer) : NULL;
    if (block && memory[physical]->address + block->offset == pointer) {
        struct device_memory *device = memory[physical];
        int i = block - device->block;
        fallocate(device->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, block->offset, block->length);
        sim_account(physical, -(int64_t)block->length);
        sim_log("%d free ptr=%p bytes=%zu", physical, pointer, block->length);
        memmove(block, block + 1, (device->blocks - i - 1) * sizeof *block);
        device->blocks--;
        error = cudaSuccess;
    }
    pthread_mutex_unlock(&sim_lock);
    return error;
}

API cudaError_t cudaMalloc(void **pointer, size_t length)
{
    NEEDS_CONTEXT();
    return sim_fail(sim_allocate(pointer, length));
}
API cudaError_t cudaFree(void *pointer)
{
    NEEDS_CONTEXT();
    return sim_fail(release(pointer));
}
API cudaError_t cudaMallocAsync(void **pointer, size_t length, cudaStream_t stream)
{
    NEEDS_CONTEXT();
    return sim_fail(sim_allocate(pointer, length));
}
API cudaError_t cudaFreeAsync(void *pointer, cudaStream_t stream)
{
    NEEDS_CONTEXT();
    return sim_fail(release(pointer));
}
API cudaError_t cudaMemGetInfo(size_t *available, size_t *total)
{
    NEEDS_CONTEXT();
    uint64_t used = sim_used_on(CURRENT);
    *total = sim_memory;
    *available = used < sim_memory ? sim_memory - used : 0;
    return cudaSuccess;
}

/* ---- copies and fills ---- */

cudaError_t sim_copy(void *target, const void *source, size_t length, const char *how)
{
    int to, from;
    if (!length) return cudaSuccess;
    pthread_mutex_lock(&sim_lock);
    char *write_at = sim_translate(target, length, &to), *read_at = sim_translate(source, length, &from);
    pthread_mutex_unlock(&sim_lock);
    sim_log("%d %s dst=%d src=%d bytes=%zu", CURRENT, how, to, from, length);
    if (!write_at || !read_at) return cudaErrorInvalidValue;
    memmove(write_at, read_at, length);
    return cudaSuccess;
}

static cudaError_t fill(void *target, int value, size_t length)
{
    int to;
    if (!length) return cudaSuccess;
    pthread_mutex_lock(&sim_lock);
    char *write_at = sim_translate(target, length, &to);
    pthread_mutex_unlock(&sim_lock);
    sim_log("%d memset dst=%d bytes=%zu", CURRENT, to, length);
    if (!write_at) return cudaErrorInvalidValue;
    memset(write_at, value, length);
    return cudaSuccess;
}

API cudaError_t cudaMemcpy(void *target, const void *source, size_t length, enum cudaMemcpyKind kind)
{
    NEEDS_CONTEXT();
    return sim_fail(sim_copy(target, source, length, "memcpy"));
}
API cudaError_t cudaMemcpyAsync(void *target, const void *source, size_t length, enum cudaMemcpyKind kind, cudaStream_t stream)
{
    NEEDS_CONTEXT();
    return sim_fail(sim_copy(target, source, length, "memcpy"));
}
API cudaError_t cudaMemcpyPeerAsync(void *target, int to, const void *source, int from, size_t length, cudaStream_t stream)
{
    NEEDS_CONTEXT();
    cudaError_t error = sim_open_context(to);
    if (!error) error = sim_open_context(from);
    return sim_fail(error ? error : sim_copy(target, source, length, "memcpyPeer"));
}
API cudaError_t cudaMemcpy2DAsync(void *target, size_t target_pitch, const void *source, size_t source_pitch, size_t width,
                                  size_t height, enum cudaMemcpyKind kind, cudaStream_t stream)
{
    NEEDS_CONTEXT();
    for (size_t row = 0; row < height; row++) {
        cudaError_t error =
            sim_copy((char *)target + row * target_pitch, (char *)source + row * source_pitch, width, "memcpy2D");
        if (error) return sim_fail(error);
    }
    return cudaSuccess;
}
API cudaError_t cudaMemset(void *target, int value, size_t length)
{
    NEEDS_CONTEXT();
    return sim_fail(fill(target, value, length));
}
API cudaError_t cudaMemsetAsync(void *target, int value, size_t length, cudaStream_t stream)
{
    NEEDS_CONTEXT();
    return sim_fail(fill(target, value, length));
}

/* ---- pinned host memory ---- */

API cudaError_t cudaHostAlloc(void **pointer, size_t wanted, unsigned flags)
{
    NEEDS_CONTEXT();
    size_t length = ALIGN_UP(wanted ? wanted : 1, 4096);
    void *address = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (address == MAP_FAILED) return sim_fail(cudaErrorMemoryAllocation);
    pthread_mutex_lock(&sim_lock);
    int kept = sim_add_range(RANGE_PINNED, address, address, length, CURRENT) != NULL;
    pthread_mutex_unlock(&sim_lock);
    if (!kept) {
        munmap(address, length);
        return sim_fail(cudaErrorMemoryAllocation);
    }
    sim_log("%d hostAlloc bytes=%zu", CURRENT, wanted);
    *pointer = address;
    return cudaSuccess;
}
API cudaError_t cudaMallocHost(void **pointer, size_t length)
{
    return cudaHostAlloc(pointer, length, 0);
}
API cudaError_t cudaHostRegister(void *pointer, size_t length, unsigned flags)
{
    NEEDS_CONTEXT();
    cudaError_t error = cudaSuccess;
    pthread_mutex_lock(&sim_lock);
    if (sim_find_range(pointer)) error = cudaErrorHostMemoryAlreadyRegistered;
    else if (!sim_add_range(RANGE_REGISTERED, pointer, pointer, length, CURRENT)) error = cudaErrorMemoryAllocation;
    pthread_mutex_unlock(&sim_lock);
    sim_log("%d hostRegister bytes=%zu", CURRENT, length);
    return sim_fail(error);
}

static cudaError_t unpin(void *pointer, int kind, cudaError_t unknown)
{
    pthread_mutex_lock(&sim_lock);
    struct sim_range *found = sim_find_range(pointer);
    int right = found && found->kind == kind && found->address == pointer;
    if (right) {
        if (kind == RANGE_PINNED) munmap(pointer, found->length);
        sim_remove_range(found);
    }
    pthread_mutex_unlock(&sim_lock);
    return sim_fail(right ? cudaSuccess : unknown);
}

API cudaError_t cudaFreeHost(void *pointer)
{
    NEEDS_CONTEXT();
    return pointer ? unpin(pointer, RANGE_PINNED, cudaErrorInvalidValue) : cudaSuccess;
}
API cudaError_t cudaHostUnregister(void *pointer)
{
    NEEDS_CONTEXT();
    return unpin(pointer, RANGE_REGISTERED, cudaErrorHostMemoryNotRegistered);
}
API cudaError_t cudaHostGetDevicePointer(void **device_pointer, void *pointer, unsigned flags)
{
    NEEDS_CONTEXT();
    *device_pointer = pointer;
    return cudaSuccess;
}

API cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *pointer)
{
    NEEDS_CONTEXT();
    memset(attributes, 0, sizeof *attributes);
    pthread_mutex_lock(&sim_lock);
    int physical = sim_device_of(pointer);
    struct sim_range *found = physical < 0 ? sim_find_range(pointer) : NULL;
    if (physical >= 0 && sim_find_block(physical, pointer)) {
        attributes->type = cudaMemoryTypeDevice;
        attributes->device = sim_ordinal_of(physical);
        attributes->devicePointer = (void *)pointer;
    } else if (found) {
        int host = found->kind == RANGE_PINNED || found->kind == RANGE_REGISTERED;
        attributes->type = host ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
        attributes->device = sim_ordinal_of(found->device);
        attributes->devicePointer = (void *)pointer;
        if (host) attributes->hostPointer = (void *)pointer;
    } else {
        attributes->type = cudaMemoryTypeUnregistered;
        attributes->device = cudaInvalidDeviceId;
        attributes->hostPointer = (void *)pointer;
    }
    pthread_mutex_unlock(&sim_lock);
    return cudaSuccess;
}
