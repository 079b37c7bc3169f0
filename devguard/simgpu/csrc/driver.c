/* driver.c - the part of the driver API that torch, Triton and ctypes callers use.
 *
 * As with the real driver, every call except cuInit returns CUDA_ERROR_NOT_INITIALIZED until this process has called cuInit
 * (or the runtime). A process that is forked after that call stays uninitialised.
 */
#include "sim.h"

static char context[MAX_DEVICES]; /* only their addresses matter: &context[ordinal] is the primary context of that device */

static CUcontext context_of(int ordinal)
{
    return (CUcontext)&context[ordinal];
}

API CUresult cuInit(unsigned flags)
{
    return (CUresult)sim_initialise();
}
API CUresult cuDriverGetVersion(int *version)
{
    *version = CUDA_VERSION;
    return CUDA_SUCCESS;
}

/* ---- devices ---- */

API CUresult cuDeviceGet(CUdevice *device, int ordinal)
{
    DRIVER_DEVICE(ordinal);
    *device = ordinal;
    return CUDA_SUCCESS;
}
API CUresult cuDeviceGetCount(int *count)
{
    DRIVER_INITIALISED();
    *count = sim_visible_count;
    return CUDA_SUCCESS;
}
API CUresult cuDeviceGetName(char *name, int length, CUdevice device)
{
    DRIVER_DEVICE(device);
    sim_device_name(sim_visible[device], name, length);
    return CUDA_SUCCESS;
}
API CUresult cuDeviceGetUuid(CUuuid *uuid, CUdevice device)
{
    DRIVER_DEVICE(device);
    sim_uuid(sim_visible[device], (unsigned char *)uuid);
    return CUDA_SUCCESS;
}
API CUresult cuDeviceTotalMem(size_t *bytes, CUdevice device)
{
    DRIVER_DEVICE(device);
    *bytes = sim_memory;
    return CUDA_SUCCESS;
}
API CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device)
{
    DRIVER_DEVICE(device);
    *value = sim_attribute(attribute, sim_visible[device]);
    return CUDA_SUCCESS;
}

/* ---- contexts ---- */

API CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active)
{
    DRIVER_DEVICE(device);
    if (flags) *flags = 0;
    *active = sim_has_context(sim_visible[device]);
    return CUDA_SUCCESS;
}
API CUresult cuDevicePrimaryCtxRetain(CUcontext *out, CUdevice device)
{
    DRIVER_DEVICE(device);
    sim_call = __func__;
    CUresult error = (CUresult)sim_open_context(device);
    if (!error) *out = context_of(device);
    return error;
}
API CUresult cuDevicePrimaryCtxRelease(CUdevice device)
{
    DRIVER_DEVICE(device);
    return CUDA_SUCCESS; /* torch never releases a context, so there is nothing to close */
}
API CUresult cuCtxGetCurrent(CUcontext *out)
{
    DRIVER_INITIALISED();
    *out = sim_bound < 0 ? NULL : context_of(sim_bound);
    return CUDA_SUCCESS;
}
API CUresult cuCtxSetCurrent(CUcontext wanted)
{
    DRIVER_INITIALISED();
    if (!wanted) {
        sim_bound = -1;
        return CUDA_SUCCESS;
    }
    long ordinal = (char *)wanted - context;
    if (ordinal < 0 || ordinal >= sim_visible_count) return CUDA_ERROR_INVALID_CONTEXT;
    sim_current = sim_bound = (int)ordinal;
    return CUDA_SUCCESS;
}
API CUresult cuCtxPushCurrent(CUcontext wanted)
{
    return cuCtxSetCurrent(wanted);
}
API CUresult cuCtxPopCurrent(CUcontext *out)
{
    return out ? cuCtxGetCurrent(out) : CUDA_SUCCESS;
}
API CUresult cuCtxGetDevice(CUdevice *device)
{
    DRIVER_INITIALISED();
    if (sim_bound < 0) return CUDA_ERROR_INVALID_CONTEXT;
    *device = sim_bound;
    return CUDA_SUCCESS;
}
API CUresult cuCtxSynchronize(void)
{
    DRIVER_INITIALISED();
    return CUDA_SUCCESS;
}

/* ---- memory ---- */

API CUresult cuMemGetInfo(size_t *available, size_t *total)
{
    DRIVER_CONTEXT();
    return (CUresult)cudaMemGetInfo(available, total);
}
API CUresult cuMemAlloc(CUdeviceptr *pointer, size_t length)
{
    DRIVER_CONTEXT();
    return (CUresult)cudaMalloc((void **)pointer, length);
}
API CUresult cuMemFree(CUdeviceptr pointer)
{
    DRIVER_CONTEXT();
    return (CUresult)cudaFree((void *)pointer);
}
API CUresult cuMemGetAddressRange(CUdeviceptr *base, size_t *length, CUdeviceptr pointer)
{
    DRIVER_INITIALISED();
    CUresult error = CUDA_SUCCESS;
    pthread_mutex_lock(&sim_lock);
    int physical = sim_device_of((void *)pointer);
    struct sim_block *block = physical >= 0 ? sim_find_block(physical, (void *)pointer) : NULL;
    struct sim_range *range = block ? NULL : sim_find_range((void *)pointer);
    if (block) {
        if (base) *base = (CUdeviceptr)(sim_arena(physical) + block->offset);
        if (length) *length = block->length;
    } else if (range) {
        if (base) *base = (CUdeviceptr)range->address;
        if (length) *length = range->length;
    } else {
        error = CUDA_ERROR_NOT_FOUND;
    }
    pthread_mutex_unlock(&sim_lock);
    return error;
}
API CUresult cuPointerGetAttribute(void *out, CUpointer_attribute attribute, CUdeviceptr pointer)
{
    DRIVER_INITIALISED();
    struct cudaPointerAttributes found;
    cudaError_t error = cudaPointerGetAttributes(&found, (void *)pointer);
    if (error) return (CUresult)error;
    if (found.type == cudaMemoryTypeUnregistered) return CUDA_ERROR_INVALID_VALUE;
    switch (attribute) {
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: *(int *)out = found.device; return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
        *(unsigned *)out = found.type == cudaMemoryTypeHost ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE;
        return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_CONTEXT: *(CUcontext *)out = found.device < 0 ? NULL : context_of(found.device); return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER: *(CUdeviceptr *)out = pointer; return CUDA_SUCCESS;
    default: return CUDA_ERROR_NOT_SUPPORTED;
    }
}
API CUresult cuMemsetD32Async(CUdeviceptr pointer, unsigned value, size_t count, CUstream stream)
{
    DRIVER_CONTEXT();
    int device;
    pthread_mutex_lock(&sim_lock);
    uint32_t *target = (uint32_t *)sim_translate((void *)pointer, count * 4, &device);
    pthread_mutex_unlock(&sim_lock);
    if (!target) return CUDA_ERROR_INVALID_VALUE;
    for (size_t i = 0; i < count; i++) target[i] = value;
    return CUDA_SUCCESS;
}
API CUresult cuStreamWriteValue32(CUstream stream, CUdeviceptr pointer, cuuint32_t value, unsigned flags)
{
    return cuMemsetD32Async(pointer, value, 1, stream);
}

#ifdef cuStreamWriteValue32 /* cuda.h 12 renames it to _v2; torch 2.6 looks up the plain name, which the driver also has */
#undef cuStreamWriteValue32
API CUresult cuStreamWriteValue32(CUstream stream, CUdeviceptr pointer, cuuint32_t value, unsigned flags)
{
    return cuMemsetD32Async(pointer, value, 1, stream);
}
#endif

/* ---- modules: loaded code is never run ---- */

API CUresult cuModuleLoadData(CUmodule *module, const void *image)
{
    DRIVER_CONTEXT();
    *module = (CUmodule)calloc(1, 64);
    return CUDA_SUCCESS;
}
API CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned count, CUjit_option *options, void **values)
{
    return cuModuleLoadData(module, image);
}
API CUresult cuModuleLoad(CUmodule *module, const char *path)
{
    return cuModuleLoadData(module, path);
}
API CUresult cuModuleUnload(CUmodule module)
{
    free(module);
    return CUDA_SUCCESS;
}
API CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name)
{
    *function = (CUfunction)strdup(name);
    return CUDA_SUCCESS;
}
API CUresult cuModuleGetGlobal(CUdeviceptr *pointer, size_t *length, CUmodule module, const char *name)
{
    return CUDA_ERROR_NOT_FOUND;
}
API CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function)
{
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return CUDA_SUCCESS;
}
API CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value)
{
    return CUDA_SUCCESS;
}
API CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config)
{
    return CUDA_SUCCESS;
}
API CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                            unsigned block_y, unsigned block_z, unsigned shared, CUstream stream, void **arguments, void **extra)
{
    DRIVER_CONTEXT();
    if (sim_stream_device((cudaStream_t)stream) != CURRENT) return CUDA_ERROR_INVALID_HANDLE;
    __atomic_add_fetch(&sim_me->launches[CURRENT], 1, __ATOMIC_SEQ_CST);
    sim_log("%d cuLaunchKernel kernel=%.300s", CURRENT, (const char *)function);
    return CUDA_SUCCESS;
}
API CUresult cuLaunchCooperativeKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                                       unsigned block_y, unsigned block_z, unsigned shared, CUstream stream, void **arguments)
{
    return cuLaunchKernel(function, grid_x, grid_y, grid_z, block_x, block_y, block_z, shared, stream, arguments, NULL);
}
API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, CUfunction function, int threads, size_t shared)
{
    *blocks = threads > 0 && threads <= 2048 ? 2048 / threads : 1;
    return CUDA_SUCCESS;
}
API CUresult cuLinkCreate(unsigned count, CUjit_option *options, void **values, CUlinkState *state)
{
    return CUDA_ERROR_NOT_SUPPORTED;
}
API CUresult cuLinkAddData(CUlinkState state, CUjitInputType type, void *data, size_t size, const char *name, unsigned count,
                           CUjit_option *options, void **values)
{
    return CUDA_ERROR_NOT_SUPPORTED;
}
API CUresult cuLinkComplete(CUlinkState state, void **image, size_t *size)
{
    return CUDA_ERROR_NOT_SUPPORTED;
}
API CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                    const cuuint64_t *dimensions, const cuuint64_t *strides, const cuuint32_t *box,
                                    const cuuint32_t *element_strides, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                    CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill)
{
    memset(map, 0, sizeof *map);
    return CUDA_SUCCESS;
}

/* ---- torch's lookup of driver functions ---- */

static CUresult unsupported(void)
{
    sim_log("- unsupported driver call");
    return CUDA_ERROR_NOT_SUPPORTED;
}

#define FUNCTION(name) { #name, (void *)name } /* the name as written, the function as cuda.h renames it (_v2) */
static const struct {
    const char *name;
    void *function;
} functions[] = {
    FUNCTION(cuInit),
    FUNCTION(cuDriverGetVersion),
    FUNCTION(cuDeviceGet),
    FUNCTION(cuDeviceGetCount),
    FUNCTION(cuDeviceGetName),
    FUNCTION(cuDeviceGetUuid),
    FUNCTION(cuDeviceGetAttribute),
    FUNCTION(cuDevicePrimaryCtxGetState),
    FUNCTION(cuDevicePrimaryCtxRetain),
    FUNCTION(cuCtxGetCurrent),
    FUNCTION(cuCtxSetCurrent),
    FUNCTION(cuCtxPushCurrent),
    FUNCTION(cuCtxPopCurrent),
    FUNCTION(cuCtxGetDevice),
    FUNCTION(cuCtxSynchronize),
    FUNCTION(cuGetErrorString),
    FUNCTION(cuGetErrorName),
    FUNCTION(cuPointerGetAttribute),
    FUNCTION(cuMemGetAddressRange),
    FUNCTION(cuMemGetAllocationGranularity),
    FUNCTION(cuMemAddressReserve),
    FUNCTION(cuMemAddressFree),
    FUNCTION(cuMemCreate),
    FUNCTION(cuMemRelease),
    FUNCTION(cuMemMap),
    FUNCTION(cuMemUnmap),
    FUNCTION(cuMemSetAccess),
    FUNCTION(cuMemExportToShareableHandle),
    FUNCTION(cuMemImportFromShareableHandle),
    FUNCTION(cuMemRetainAllocationHandle),
    FUNCTION(cuMemGetAllocationPropertiesFromHandle),
    FUNCTION(cuMemsetD32Async),
    FUNCTION(cuStreamWriteValue32),
};

API cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long long flags,
                                                 enum cudaDriverEntryPointQueryResult *result)
{
    *function = (void *)unsupported; /* torch looks up some functions at start-up that it never calls */
    for (size_t i = 0; i < COUNT(functions); i++)
        if (!strcmp(functions[i].name, name)) *function = functions[i].function;
    if (result) *result = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}
#if CUDART_VERSION < 13000
API cudaError_t cudaGetDriverEntryPoint(const char *name, void **function, unsigned long long flags,
                                        enum cudaDriverEntryPointQueryResult *result)
{
    return cudaGetDriverEntryPointByVersion(name, function, CUDA_VERSION, flags, result);
}
#endif
