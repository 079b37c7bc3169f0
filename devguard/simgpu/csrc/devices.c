/* devices.c - the number of devices, their properties, and the current device.
 *
 * Counting devices and reading their properties opens no context. cudaSetDevice opens one, as it does since CUDA 12. Any two
 * devices can access each other's memory. The properties are those of an H100, except the size of the memory.
 */
#include "sim.h"

void sim_device_name(int physical, char *text, size_t length)
{
    snprintf(text, length, "Simulated GPU %d", physical);
}

API cudaError_t cudaGetDeviceCount(int *count)
{
    *count = 0;
    NEEDS_DRIVER();
    *count = sim_visible_count;
    return cudaSuccess;
}
API cudaError_t cudaGetDevice(int *device)
{
    NEEDS_DRIVER();
    *device = sim_current;
    return cudaSuccess;
}
API cudaError_t cudaSetDevice(int device)
{
    NEEDS_DRIVER();
    VALID_ORDINAL(device);
    sim_current = device;
    sim_log("%d setDevice", CURRENT);
    NEEDS_CONTEXT();
    return cudaSuccess;
}
API cudaError_t cudaDeviceSynchronize(void)
{
    NEEDS_CONTEXT();
    return cudaSuccess;
}
API cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer)
{
    NEEDS_DRIVER();
    VALID_ORDINAL(device);
    VALID_ORDINAL(peer);
    *can = device != peer;
    return cudaSuccess;
}
API cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags)
{
    static uint8_t enabled[MAX_DEVICES][MAX_DEVICES];
    NEEDS_CONTEXT();
    VALID_ORDINAL(peer);
    if (peer == sim_current) return sim_fail(cudaErrorInvalidDevice);
    cudaError_t error = sim_open_context(peer);
    if (error) return sim_fail(error);
    if (__atomic_exchange_n(&enabled[sim_current][peer], 1, __ATOMIC_SEQ_CST)) return sim_fail(cudaErrorPeerAccessAlreadyEnabled);
    sim_log("%d enablePeer peer=%d", CURRENT, sim_visible[peer]);
    return cudaSuccess;
}
API cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest)
{
    NEEDS_CONTEXT();
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return cudaSuccess;
}
API cudaError_t cudaDriverGetVersion(int *version)
{
    *version = CUDA_VERSION;
    return cudaSuccess;
}
API cudaError_t cudaRuntimeGetVersion(int *version)
{
    *version = CUDART_VERSION;
    return cudaSuccess;
}
API cudaError_t cudaDeviceGetPCIBusId(char *text, int length, int device)
{
    NEEDS_DRIVER();
    VALID_ORDINAL(device);
    snprintf(text, length, "0000:%02X:00.0", sim_visible[device] + 1);
    return cudaSuccess;
}

int sim_attribute(int attribute, int physical)
{
    switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY:
    case cudaDevAttrReservedSharedMemoryPerBlock: return 1024;
    case cudaDevAttrMaxBlockDimZ: return 64;
    case cudaDevAttrMaxGridDimX:
    case cudaDevAttrMaxPitch: return 2147483647;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return 232448;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return 233472;
    case cudaDevAttrTotalConstantMemory:
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
    case cudaDevAttrWarpSize:
    case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
    case cudaDevAttrMultiProcessorCount: return 132;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrComputeCapabilityMajor: return sim_capability_major;
    case cudaDevAttrComputeCapabilityMinor: return sim_capability_minor;
    case cudaDevAttrL2CacheSize: return 50 << 20;
    case cudaDevAttrClockRate: return 1980000;
    case cudaDevAttrMemoryClockRate: return 2619000;
    case cudaDevAttrGlobalMemoryBusWidth: return 5120;
    case cudaDevAttrPciBusId: return physical + 1;
    case cudaDevAttrTextureAlignment: return 512;
    case cudaDevAttrAsyncEngineCount: return 3;
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrConcurrentKernels:
    case cudaDevAttrCanMapHostMemory:
    case cudaDevAttrManagedMemory:
    case cudaDevAttrConcurrentManagedAccess:
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrStreamPrioritiesSupported:
    case cudaDevAttrMemoryPoolsSupported:
    case cudaDevAttrHostNativeAtomicSupported:
    case cudaDevAttrIpcEventSupport:
    case CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED: return 1;
    default: return 0;
    }
}

API cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device)
{
    NEEDS_DRIVER();
    VALID_ORDINAL(device);
    *value = sim_attribute(attribute, sim_visible[device]);
    return cudaSuccess;
}

API cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device)
{
    NEEDS_DRIVER();
    VALID_ORDINAL(device);
    int physical = sim_visible[device];
    memset(p, 0, sizeof *p);
    sim_device_name(physical, p->name, sizeof p->name);
    sim_uuid(physical, (unsigned char *)&p->uuid);
    p->totalGlobalMem = sim_memory;
    p->major = sim_capability_major;
    p->minor = sim_capability_minor;
    p->pciBusID = physical + 1;
    p->warpSize = 32;
    p->multiProcessorCount = 132;
    p->sharedMemPerBlock = 49152;
    p->sharedMemPerBlockOptin = 232448;
    p->sharedMemPerMultiprocessor = 233472;
    p->reservedSharedMemPerBlock = 1024;
    p->totalConstMem = 65536;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->maxThreadsPerBlock = 1024;
    p->maxThreadsPerMultiProcessor = 2048;
    p->maxBlocksPerMultiProcessor = 32;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->memPitch = 2147483647;
    p->textureAlignment = 512;
    p->l2CacheSize = 50 << 20;
    p->memoryBusWidth = 5120;
    p->asyncEngineCount = 3;
    p->unifiedAddressing = p->concurrentKernels = p->canMapHostMemory = p->managedMemory = 1;
    p->concurrentManagedAccess = p->cooperativeLaunch = p->streamPrioritiesSupported = 1;
    p->memoryPoolsSupported = p->ipcEventSupported = 1;
    return cudaSuccess;
}
