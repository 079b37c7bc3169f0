/* streams.c - streams, events, graphs, memory pools.
 *
 * Work is done when it is submitted, so a stream only names a device, an event is a time, and a graph is empty: a replay does
 * nothing. Each of them keeps its device, because CUDA refuses to mix devices.
 */
#include "sim.h"

#include <time.h>

struct stream {
    int device, priority; /* the device is physical */
    unsigned flags;
    int capturing;
    unsigned long long capture_id;
};

struct event {
    int device;
    unsigned flags;
    int recorded;
    struct timespec time;
};

static int is_default(cudaStream_t stream) /* NULL, cudaStreamLegacy, cudaStreamPerThread */
{
    return (uintptr_t)stream <= 2;
}

int sim_stream_device(cudaStream_t stream)
{
    return is_default(stream) ? CURRENT : ((struct stream *)stream)->device;
}

/* ---- streams ---- */

API cudaError_t cudaStreamCreateWithPriority(cudaStream_t *out, unsigned flags, int priority)
{
    NEEDS_CONTEXT();
    struct stream *stream = calloc(1, sizeof *stream);
    if (!stream) return sim_fail(cudaErrorMemoryAllocation);
    stream->device = CURRENT;
    stream->priority = priority;
    stream->flags = flags;
    *out = (cudaStream_t)stream;
    sim_log("%d streamCreate", CURRENT);
    return cudaSuccess;
}
API cudaError_t cudaStreamCreate(cudaStream_t *stream)
{
    return cudaStreamCreateWithPriority(stream, 0, 0);
}
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags)
{
    return cudaStreamCreateWithPriority(stream, flags, 0);
}
API cudaError_t cudaStreamDestroy(cudaStream_t stream)
{
    NEEDS_CONTEXT();
    if (!is_default(stream)) free(stream);
    return cudaSuccess;
}
API cudaError_t cudaStreamQuery(cudaStream_t stream)
{
    NEEDS_CONTEXT();
    return cudaSuccess;
}
API cudaError_t cudaStreamSynchronize(cudaStream_t stream)
{
    NEEDS_CONTEXT();
    return cudaSuccess;
}
API cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags)
{
    NEEDS_CONTEXT();
    return cudaSuccess;
}
API cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority)
{
    NEEDS_CONTEXT();
    *priority = is_default(stream) ? 0 : ((struct stream *)stream)->priority;
    return cudaSuccess;
}
API cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t callback, void *data, unsigned flags)
{
    NEEDS_CONTEXT();
    callback(stream, cudaSuccess, data);
    return cudaSuccess;
}
API cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data)
{
    NEEDS_CONTEXT();
    function(data);
    return cudaSuccess;
}

/* ---- capture and graphs ---- */

static int is_capturing(cudaStream_t stream)
{
    return !is_default(stream) && ((struct stream *)stream)->capturing;
}

API cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status)
{
    NEEDS_CONTEXT();
    *status = is_capturing(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

static cudaError_t capture_info(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                cudaGraph_t *graph, const cudaGraphNode_t **nodes, size_t *count)
{
    NEEDS_CONTEXT();
    *status = is_capturing(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    if (is_capturing(stream)) {
        if (id) *id = ((struct stream *)stream)->capture_id;
        if (graph) *graph = (cudaGraph_t)stream;
    }
    if (nodes) *nodes = NULL;
    if (count) *count = 0;
    return cudaSuccess;
}

#if CUDART_VERSION < 13000 /* CUDA 13 added the edges' data to both calls */
API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                         cudaGraph_t *graph, const cudaGraphNode_t **nodes, size_t *count)
{
    return capture_info(stream, status, id, graph, nodes, count);
}
API cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t node, cudaGraphNode_t *nodes, size_t *count)
{
    *count = 0;
    return cudaSuccess;
}
#else
API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                         cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                                         size_t *count)
{
    if (edges) *edges = NULL;
    return capture_info(stream, status, id, graph, nodes, count);
}
API cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t node, cudaGraphNode_t *nodes, cudaGraphEdgeData *edges, size_t *count)
{
    *count = 0;
    return cudaSuccess;
}
#endif

API cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode)
{
    static unsigned long long last_id;
    NEEDS_CONTEXT();
    if (is_default(stream)) return sim_fail(cudaErrorInvalidValue);
    ((struct stream *)stream)->capturing = 1;
    ((struct stream *)stream)->capture_id = __atomic_add_fetch(&last_id, 1, __ATOMIC_SEQ_CST);
    return cudaSuccess;
}
API cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph)
{
    NEEDS_CONTEXT();
    if (is_default(stream)) return sim_fail(cudaErrorInvalidValue);
    ((struct stream *)stream)->capturing = 0;
    *graph = (cudaGraph_t)calloc(1, 64);
    return cudaSuccess;
}
API cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode)
{
    return cudaSuccess;
}
API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long flags)
{
    NEEDS_CONTEXT();
    *executable = (cudaGraphExec_t)calloc(1, 64);
    return cudaSuccess;
}
API cudaError_t cudaGraphInstantiate(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long flags)
{
    return cudaGraphInstantiateWithFlags(executable, graph, flags);
}
API cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream)
{
    NEEDS_CONTEXT();
    sim_log("%d graphLaunch", sim_stream_device(stream));
    return cudaSuccess;
}
API cudaError_t cudaGraphDestroy(cudaGraph_t graph)
{
    free(graph);
    return cudaSuccess;
}
API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable)
{
    free(executable);
    return cudaSuccess;
}
API cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count)
{
    *count = 1; /* torch warns about an empty graph if the count is 0 */
    return cudaSuccess;
}
API cudaError_t cudaGraphDebugDotPrint(cudaGraph_t graph, const char *path, unsigned flags)
{
    return cudaSuccess;
}

/* ---- events ---- */

API cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned flags)
{
    NEEDS_CONTEXT();
    struct event *event = calloc(1, sizeof *event);
    if (!event) return sim_fail(cudaErrorMemoryAllocation);
    event->device = CURRENT;
    event->flags = flags;
    *out = (cudaEvent_t)event;
    sim_log("%d eventCreate", CURRENT);
    return cudaSuccess;
}
API cudaError_t cudaEventCreate(cudaEvent_t *event)
{
    return cudaEventCreateWithFlags(event, 0);
}
API cudaError_t cudaEventDestroy(cudaEvent_t event)
{
    free(event);
    return cudaSuccess;
}
API cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t stream)
{
    NEEDS_CONTEXT();
    struct event *event = (struct event *)handle;
    if (!event || event->device != sim_stream_device(stream)) return sim_fail(cudaErrorInvalidResourceHandle);
    event->recorded = 1;
    clock_gettime(CLOCK_MONOTONIC, &event->time);
    return cudaSuccess;
}
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags)
{
    return cudaEventRecord(event, stream);
}
API cudaError_t cudaEventQuery(cudaEvent_t event)
{
    NEEDS_CONTEXT();
    return cudaSuccess;
}
API cudaError_t cudaEventSynchronize(cudaEvent_t event)
{
    NEEDS_CONTEXT();
    return cudaSuccess;
}
API cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t begin, cudaEvent_t end)
{
    NEEDS_CONTEXT();
    struct event *a = (struct event *)begin, *b = (struct event *)end;
    if (!a->recorded || !b->recorded || a->device != b->device || ((a->flags | b->flags) & cudaEventDisableTiming))
        return sim_fail(cudaErrorInvalidResourceHandle);
    *milliseconds = (b->time.tv_sec - a->time.tv_sec) * 1e3f + (b->time.tv_nsec - a->time.tv_nsec) / 1e6f;
    return cudaSuccess;
}

int sim_exportable_event(cudaEvent_t handle, int *physical)
{
    struct event *event = (struct event *)handle;
    *physical = event->device;
    return (event->flags & cudaEventInterprocess) != 0;
}

cudaEvent_t sim_imported_event(int physical)
{
    struct event *event = calloc(1, sizeof *event);
    if (!event) return NULL;
    event->device = physical;
    event->flags = cudaEventInterprocess | cudaEventDisableTiming;
    event->recorded = 1; /* the exporter's work was done when it was submitted */
    return (cudaEvent_t)event;
}

/* ---- memory pools (PYTORCH_CUDA_ALLOC_CONF=backend:cudaMallocAsync) ---- */

#define POOL_BASE 0x1000

API cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int device)
{
    NEEDS_CONTEXT();
    VALID_ORDINAL(device);
    *pool = (cudaMemPool_t)(uintptr_t)(POOL_BASE + device);
    return cudaSuccess;
}
API cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr attribute, void *value)
{
    return cudaSuccess;
}
API cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr attribute, void *value)
{
    int device = (int)((uintptr_t)pool - POOL_BASE);
    *(uint64_t *)value = sim_me && device >= 0 && device < sim_visible_count ? sim_me->bytes[sim_visible[device]] : 0;
    return cudaSuccess;
}
API cudaError_t cudaMemPoolSetAccess(cudaMemPool_t pool, const struct cudaMemAccessDesc *access, size_t count)
{
    return cudaSuccess;
}
API cudaError_t cudaMemPoolTrimTo(cudaMemPool_t pool, size_t keep)
{
    return cudaSuccess;
}
API cudaError_t cudaProfilerStart(void)
{
    return cudaSuccess;
}
API cudaError_t cudaProfilerStop(void)
{
    return cudaSuccess;
}
