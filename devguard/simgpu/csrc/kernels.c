/* kernels.c - kernels are registered, counted and logged, but not run.
 *
 * Only torch's contiguous fill (zeros, ones, full, fill_, zero_) runs, so that such tensors hold the right values. The results
 * of all other kernels are whatever was in the memory.
 */
#include "sim.h"

struct kernel {
    const void *host;
    const char *name;
};

struct variable { /* a __device__ variable, which gets memory on a device when its address there is first read */
    const void *host;
    const char *name;
    size_t size;
    void *memory[MAX_DEVICES];
};

static struct kernel *kernels;
static size_t kernel_count, kernel_room;
static int kernels_sorted;
static struct variable *variables;
static size_t variable_count, variable_room;

/* ---- called by nvcc's start-up code, before main ---- */

API void **__cudaRegisterFatBinary(void *binary)
{
    static void *handle;
    return &handle;
}
API void __cudaRegisterFatBinaryEnd(void **handle)
{
}
API void __cudaUnregisterFatBinary(void **handle)
{
}
API char __cudaInitModule(void **handle)
{
    return 0;
}

API void __cudaRegisterFunction(void **handle, const char *host, char *device, const char *name, int thread_limit, void *a, void *b,
                                void *c, void *d, int *e)
{
    pthread_mutex_lock(&sim_lock);
    if (kernel_count == kernel_room) {
        kernel_room = kernel_room ? kernel_room * 2 : 1 << 16;
        kernels = realloc(kernels, kernel_room * sizeof *kernels);
        if (!kernels) abort();
    }
    kernels[kernel_count++] = (struct kernel){ host, name };
    kernels_sorted = 0;
    pthread_mutex_unlock(&sim_lock);
}

API void __cudaRegisterVar(void **handle, char *host, char *device, const char *name, int external, size_t size, int constant,
                           int global)
{
    pthread_mutex_lock(&sim_lock);
    if (variable_count == variable_room) {
        variable_room = variable_room ? variable_room * 2 : 256;
        variables = realloc(variables, variable_room * sizeof *variables);
        if (!variables) abort();
    }
    variables[variable_count++] = (struct variable){ .host = host, .name = name, .size = size };
    pthread_mutex_unlock(&sim_lock);
}

API void __cudaRegisterManagedVar(void **handle, void **host_variable, char *device, const char *name, int external, size_t size,
                                  int constant, int global)
{
}

static int by_host(const void *a, const void *b)
{
    const struct kernel *x = a, *y = b;
    return x->host < y->host ? -1 : x->host > y->host;
}

static const char *name_of(const void *host)
{
    pthread_mutex_lock(&sim_lock);
    if (!kernels_sorted) {
        qsort(kernels, kernel_count, sizeof *kernels, by_host);
        kernels_sorted = 1;
    }
    struct kernel wanted = { host, NULL };
    struct kernel *found = kernel_count ? bsearch(&wanted, kernels, kernel_count, sizeof *kernels, by_host) : NULL;
    const char *name = found ? found->name : "?";
    pthread_mutex_unlock(&sim_lock);
    return name;
}

/* ---- the fill ---- */

/* Returns the width of a type from its mangled name; 0: unknown. */
static size_t width_of(const char *type)
{
    switch (*type) {
    case 'd': case 'l': return 8;
    case 'f': case 'i': return 4;
    case 's': return 2;
    case 'a': case 'h': case 'b': return 1;
    }
    if (!strncmp(type, "N3c104Half", 10) || !strncmp(type, "N3c108BFloat16", 14)) return 2;
    return 0;
}

/* vectorized_elementwise_kernel<vec, FillFunctor<T>, std::array<char*, 1>>(int count, FillFunctor<T> value, array pointers) */
static void run_if_fill(const char *name, void **arguments)
{
    const char *fill = strstr(name, "vectorized_elementwise_kernel");
    fill = fill ? strstr(fill, "FillFunctorI") : NULL;
    if (!fill || !strstr(fill, "arrayIPcLm1E")) return;
    if (!strstr(name, "Eviv") == !strstr(name, "EEviT0_T1_")) return; /* the mangled signature, without further arguments */
    size_t width = width_of(fill + strlen("FillFunctorI"));
    int count = *(int *)arguments[0], device;
    if (!width || count <= 0) return;
    pthread_mutex_lock(&sim_lock);
    char *target = sim_translate(*(char **)arguments[2], width * count, &device);
    pthread_mutex_unlock(&sim_lock);
    for (int i = 0; target && i < count; i++) memcpy(target + i * width, arguments[1], width);
}

/* ---- launches ---- */

static cudaError_t launch(const void *function, dim3 grid, dim3 block, void **arguments, cudaStream_t stream)
{
    NEEDS_CONTEXT();
    if (sim_stream_device(stream) != CURRENT) return sim_fail(cudaErrorInvalidResourceHandle);
    const char *name = name_of(function);
    __atomic_add_fetch(&sim_me->launches[CURRENT], 1, __ATOMIC_SEQ_CST);
    sim_log("%d launch grid=%u block=%u kernel=%.300s", CURRENT, grid.x, block.x, name);
    run_if_fill(name, arguments);
    return cudaSuccess;
}

API cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream)
{
    return launch(function, grid, block, arguments, stream);
}
API cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream)
{
    return launch((void *)kernel, grid, block, arguments, stream);
}
API cudaError_t cudaLaunchCooperativeKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared,
                                            cudaStream_t stream)
{
    return launch(function, grid, block, arguments, stream);
}
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function, void **arguments)
{
    return launch(function, config->gridDim, config->blockDim, arguments, config->stream);
}
API cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function)
{
    *kernel = (cudaKernel_t)function;
    return cudaSuccess;
}

/* kernel<<<...>>> pushes its configuration, and the kernel's stub pops it. */
static __thread struct {
    dim3 grid, block;
    size_t shared;
    void *stream;
} pushed[16];
static __thread unsigned pushed_count;

API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream)
{
    if (pushed_count == COUNT(pushed)) return 1;
    pushed[pushed_count].grid = grid;
    pushed[pushed_count].block = block;
    pushed[pushed_count].shared = shared;
    pushed[pushed_count++].stream = stream;
    return 0;
}
API cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream)
{
    if (!pushed_count) return cudaErrorInvalidValue;
    pushed_count--;
    *grid = pushed[pushed_count].grid;
    *block = pushed[pushed_count].block;
    *shared = pushed[pushed_count].shared;
    *(void **)stream = pushed[pushed_count].stream;
    return cudaSuccess;
}

API cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function)
{
    NEEDS_CONTEXT();
    memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock = 1024;
    attributes->numRegs = 32;
    attributes->binaryVersion = attributes->ptxVersion = sim_capability_major * 10 + sim_capability_minor;
    attributes->maxDynamicSharedSizeBytes = 49152;
    return cudaSuccess;
}
API cudaError_t cudaFuncSetAttribute(const void *function, enum cudaFuncAttribute attribute, int value)
{
    NEEDS_CONTEXT();
    return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *function, int threads, size_t shared)
{
    NEEDS_CONTEXT();
    *blocks = threads > 0 && threads <= 2048 ? 2048 / threads : 1;
    return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function, int threads, size_t shared,
                                                                       unsigned flags)
{
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, function, threads, shared);
}

/* ---- device variables ---- */

API cudaError_t cudaGetSymbolAddress(void **pointer, const void *symbol)
{
    NEEDS_CONTEXT();
    cudaError_t error = cudaErrorSymbolNotFound;
    pthread_mutex_lock(&sim_lock);
    for (size_t i = 0; i < variable_count; i++) {
        if (variables[i].host != symbol) continue;
        void **memory = &variables[i].memory[CURRENT];
        error = *memory ? cudaSuccess : sim_allocate(memory, variables[i].size);
        *pointer = *memory;
        break;
    }
    pthread_mutex_unlock(&sim_lock);
    return sim_fail(error);
}
API cudaError_t cudaMemcpyToSymbol(const void *symbol, const void *source, size_t length, size_t offset, enum cudaMemcpyKind kind)
{
    void *pointer;
    cudaError_t error = cudaGetSymbolAddress(&pointer, symbol);
    return error ? error : sim_fail(sim_copy((char *)pointer + offset, source, length, "memcpyToSymbol"));
}
