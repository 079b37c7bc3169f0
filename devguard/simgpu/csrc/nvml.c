/* nvml.c - the NVML calls that torch and nvidia-ml-py make, answered from the state file.
 *
 * NVML sees every device and ignores CUDA_VISIBLE_DEVICES. The header packages do not contain nvml.h, so the few types are
 * declared here.
 */
#include "sim.h"

typedef int nvml_status;
enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, DRIVER_NOT_LOADED = 9 };

struct memory_info {
    unsigned long long total, free, used;
};
struct process_v1 {
    unsigned pid;
    unsigned long long used;
};
struct process_v2 {
    unsigned pid;
    unsigned long long used;
    unsigned gpu_instance, compute_instance;
};

#define HANDLE_BASE 0x100
static void *handle_of(int physical)
{
    return (void *)(uintptr_t)(HANDLE_BASE + physical);
}
static int device_of(void *handle)
{
    return (int)((uintptr_t)handle - HANDLE_BASE);
}

API nvml_status nvmlInit_v2(void)
{
    return sim_physical_count ? SUCCESS : DRIVER_NOT_LOADED;
}
API nvml_status nvmlInit(void)
{
    return nvmlInit_v2();
}
API nvml_status nvmlInitWithFlags(unsigned flags)
{
    return nvmlInit_v2();
}
API nvml_status nvmlShutdown(void)
{
    return SUCCESS;
}
API const char *nvmlErrorString(nvml_status status)
{
    return status ? "simulated NVML error" : "Success";
}
API nvml_status nvmlSystemGetCudaDriverVersion_v2(int *version)
{
    *version = CUDA_VERSION;
    return SUCCESS;
}
API nvml_status nvmlSystemGetDriverVersion(char *text, unsigned length)
{
    snprintf(text, length, "580.00.00");
    return SUCCESS;
}

/* ---- devices ---- */

API nvml_status nvmlDeviceGetCount_v2(unsigned *count)
{
    *count = sim_physical_count;
    return SUCCESS;
}
API nvml_status nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle)
{
    if (index >= (unsigned)sim_physical_count) return INVALID_ARGUMENT;
    *handle = handle_of(index);
    return SUCCESS;
}
API nvml_status nvmlDeviceGetHandleByPciBusId_v2(const char *text, void **handle)
{
    const char *colon = strchr(text, ':'); /* domain:bus:device.function, with the bus number of devices.c */
    long bus = colon ? strtol(colon + 1, NULL, 16) : 0;
    if (bus < 1 || bus > sim_physical_count) return NOT_FOUND;
    *handle = handle_of(bus - 1);
    return SUCCESS;
}
API nvml_status nvmlDeviceGetHandleByUUID(const char *text, void **handle)
{
    char uuid[48];
    for (int i = 0; i < sim_physical_count; i++) {
        sim_uuid_text(i, uuid);
        if (strcmp(uuid, text)) continue;
        *handle = handle_of(i);
        return SUCCESS;
    }
    return NOT_FOUND;
}
API nvml_status nvmlDeviceGetIndex(void *handle, unsigned *index)
{
    *index = device_of(handle);
    return SUCCESS;
}
API nvml_status nvmlDeviceGetUUID(void *handle, char *text, unsigned length)
{
    char uuid[48];
    sim_uuid_text(device_of(handle), uuid);
    snprintf(text, length, "%s", uuid);
    return SUCCESS;
}
API nvml_status nvmlDeviceGetName(void *handle, char *text, unsigned length)
{
    sim_device_name(device_of(handle), text, length);
    return SUCCESS;
}
API nvml_status nvmlDeviceGetMemoryInfo(void *handle, struct memory_info *info)
{
    uint64_t used = sim_used_on(device_of(handle));
    info->total = sim_memory;
    info->used = used;
    info->free = used < sim_memory ? sim_memory - used : 0;
    return SUCCESS;
}

/* ---- the processes on a device ---- */

static nvml_status running(void *handle, unsigned *count, void *out, int version)
{
    int physical = device_of(handle);
    unsigned room = *count, found = 0;
    for (uint32_t i = 0; i < sim_state->taken; i++) {
        struct sim_process *process = &sim_state->process[i];
        if (!(process->contexts >> physical & 1) || !sim_alive(process)) continue;
        if (found < room && out) {
            unsigned long long used = process->bytes[physical] + sim_context_bytes;
            if (version == 1) ((struct process_v1 *)out)[found] = (struct process_v1){ process->pid, used };
            else ((struct process_v2 *)out)[found] = (struct process_v2){ process->pid, used, ~0u, ~0u };
        }
        found++;
    }
    *count = found;
    return found > room ? INSUFFICIENT_SIZE : SUCCESS;
}

API nvml_status nvmlDeviceGetComputeRunningProcesses(void *handle, unsigned *count, void *out)
{
    return running(handle, count, out, 1);
}
API nvml_status nvmlDeviceGetComputeRunningProcesses_v2(void *handle, unsigned *count, void *out)
{
    return running(handle, count, out, 2);
}
API nvml_status nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned *count, void *out)
{
    return running(handle, count, out, 2);
}

/* ---- not simulated ---- */

API nvml_status nvmlDeviceGetNvLinkRemoteDeviceType(void *handle, unsigned link, int *type)
{
    return NOT_SUPPORTED;
}
API nvml_status nvmlDeviceGetNvLinkRemotePciInfo_v2(void *handle, unsigned link, void *info)
{
    return NOT_SUPPORTED;
}
struct fabric_info {
    unsigned version; /* set by the caller */
    unsigned char cluster[16];
    nvml_status status;
    unsigned clique;
    unsigned char state; /* 0: no fabric; torch asserts that the call itself succeeds */
};
API nvml_status nvmlDeviceGetGpuFabricInfoV(void *handle, struct fabric_info *info)
{
    memset(info->cluster, 0, sizeof info->cluster);
    info->status = SUCCESS;
    info->clique = info->state = 0;
    return SUCCESS;
}
