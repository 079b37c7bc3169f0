/* errors.c - error codes, their names and texts, and the last error of each thread. */
#include "sim.h"

static const struct {
    int code;
    const char *name, *text;
} errors[] = {
    { 0, "cudaSuccess", "no error" },
    { 1, "cudaErrorInvalidValue", "invalid argument" },
    { 2, "cudaErrorMemoryAllocation", "out of memory" },
    { 3, "cudaErrorInitializationError", "initialization error" },
    { 100, "cudaErrorNoDevice", "no CUDA-capable device is detected" },
    { 101, "cudaErrorInvalidDevice", "invalid device ordinal" },
    { 201, "cudaErrorDeviceUninitialized", "invalid device context" },
    { 205, "cudaErrorMapBufferObjectFailed", "mapping of buffer object failed" },
    { 400, "cudaErrorInvalidResourceHandle", "invalid resource handle" },
    { 500, "cudaErrorSymbolNotFound", "named symbol not found" },
    { 600, "cudaErrorNotReady", "device not ready" },
    { 704, "cudaErrorPeerAccessAlreadyEnabled", "peer access is already enabled" },
    { 705, "cudaErrorPeerAccessNotEnabled", "peer access has not been enabled" },
    { 712, "cudaErrorHostMemoryAlreadyRegistered", "part or all of the requested memory range is already mapped" },
    { 713, "cudaErrorHostMemoryNotRegistered", "pointer does not correspond to a registered memory region" },
    { 801, "cudaErrorNotSupported", "operation not supported" },
};

cudaError_t sim_fail(cudaError_t error)
{
    if (error) {
        sim_last_error = error;
        sim_log("%d error code=%d", sim_current, error);
    }
    return error;
}

API const char *cudaGetErrorName(cudaError_t error)
{
    for (size_t i = 0; i < COUNT(errors); i++)
        if (errors[i].code == (int)error) return errors[i].name;
    return "cudaErrorUnknown";
}
API const char *cudaGetErrorString(cudaError_t error)
{
    for (size_t i = 0; i < COUNT(errors); i++)
        if (errors[i].code == (int)error) return errors[i].text;
    return "unknown error (simulated GPU)";
}
API cudaError_t cudaGetLastError(void)
{
    cudaError_t error = sim_last_error;
    sim_last_error = cudaSuccess;
    return error;
}
API cudaError_t cudaPeekAtLastError(void)
{
    return sim_last_error;
}

API CUresult cuGetErrorString(CUresult error, const char **text)
{
    *text = cudaGetErrorString((cudaError_t)error);
    return CUDA_SUCCESS;
}
API CUresult cuGetErrorName(CUresult error, const char **text)
{
    *text = cudaGetErrorName((cudaError_t)error);
    return CUDA_SUCCESS;
}
