/* state.c - the settings, the log, and the state file, which holds the use of each simulated GPU by each process.
 *
 * The state file is one memory-mapped struct sim_state. A process takes a slot when it initialises CUDA: an unused slot if there
 * is one, else the slot of the oldest dead process. The record of a dead process stays in its slot but no longer counts.
 * Several users or PID namespaces are not modelled: all processes of one state file must see each other in /proc.
 */
#include "sim.h"

#include "../../support/csrc/process.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>

struct sim_state *sim_state;
struct sim_process *sim_me;
uint64_t sim_memory, sim_context_bytes;
int sim_physical_count, sim_visible_count, sim_visible[MAX_DEVICES];
int sim_capability_major = 9, sim_capability_minor = 0;
pthread_mutex_t sim_lock;

__thread int sim_current;
__thread int sim_bound = -1;
__thread cudaError_t sim_last_error;
__thread const char *sim_call = "?";

static int log_fd = -1, state_fd = -1;
static struct stat log_file;
static pid_t initialised_by;   /* 0: not initialised; another pid: forked after that process initialised CUDA */
static int state_unusable;

static long setting(const char *name, long otherwise)
{
    const char *text = getenv(name);
    return text && *text ? strtol(text, NULL, 0) : otherwise;
}

void sim_log(const char *format, ...)
{
    struct stat now; /* The program may have closed the log, and opened its own file under the same number. */
    if (log_fd < 0 || fstat(log_fd, &now) || now.st_dev != log_file.st_dev || now.st_ino != log_file.st_ino) return;
    char line[768];
    int length = snprintf(line, sizeof line, "%d %ld ", getpid(), syscall(SYS_gettid));
    va_list arguments;
    va_start(arguments, format);
    length += vsnprintf(line + length, sizeof line - length - 1, format, arguments);
    va_end(arguments);
    if (length > (int)sizeof line - 2) length = sizeof line - 2;
    line[length++] = '\n';
    if (write(log_fd, line, length) < 0) { /* An unwritable log must not stop the program. */
    }
}

static void complain(const char *what, const char *path)
{
    if (standard_error() >= 0) fprintf(stderr, "devguard simulated GPUs: %s: %s\n", path, what);
}

/* ---- the file ---- */

/* Locks or unlocks the file, also against forked siblings. flock would not: siblings share the open file, which owns the lock. */
static void set_lock(int fd, short type)
{
    struct flock whole = { .l_type = type, .l_whence = SEEK_SET };
    while (fcntl(fd, F_SETLKW, &whole) && errno == EINTR) {}
}

static int prepare_state_file(int fd, const char *path)
{
    struct stat info;
    int usable = 0;
    set_lock(fd, F_WRLCK);
    if (fstat(fd, &info)) {
        complain(strerror(errno), path);
    } else if (info.st_size == 0) {
        struct sim_state header;
        memset(&header, 0, sizeof header);
        memcpy(header.magic, STATE_MAGIC, sizeof header.magic);
        header.version = STATE_VERSION;
        header.slots = MAX_PROCESSES;
        header.slot_size = sizeof(struct sim_process);
        header.memory = sim_memory;
        header.context_bytes = sim_context_bytes;
        size_t length = offsetof(struct sim_state, process);
        usable = !ftruncate(fd, sizeof header) && pwrite(fd, &header, length, 0) == (ssize_t)length;
        if (!usable) complain(strerror(errno), path);
    } else {
        struct sim_state header;
        size_t length = offsetof(struct sim_state, process);
        usable = info.st_size == sizeof header && pread(fd, &header, length, 0) == (ssize_t)length &&
                 !memcmp(header.magic, STATE_MAGIC, sizeof header.magic) && header.version == STATE_VERSION &&
                 header.slots == MAX_PROCESSES && header.slot_size == sizeof(struct sim_process);
        if (!usable) complain("is not a state file of this version; set DEVGUARD_SIM_STATE to another path", path);
    }
    set_lock(fd, F_UNLCK);
    return usable;
}

static void open_state(void)
{
    const char *path = getenv("DEVGUARD_SIM_STATE");
    if (path && *path) {
        state_fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
        if (state_fd < 0) complain(strerror(errno), path);
        if (state_fd < 0 || !prepare_state_file(state_fd, path)) state_unusable = 1;
    }
    int shared = state_fd >= 0 && !state_unusable;
    sim_state = mmap(NULL, sizeof *sim_state, PROT_READ | PROT_WRITE, MAP_SHARED | (shared ? 0 : MAP_ANONYMOUS),
                     shared ? state_fd : -1, 0);
    if (sim_state == MAP_FAILED) {
        complain("cannot be mapped", path ? path : "the state");
        abort();
    }
}

static __attribute__((constructor)) void load(void)
{
    look_for_stderr();
    pthread_mutexattr_t recursive;
    pthread_mutexattr_init(&recursive);
    pthread_mutexattr_settype(&recursive, PTHREAD_MUTEX_RECURSIVE);
    pthread_mutex_init(&sim_lock, &recursive);

    sim_physical_count = setting("DEVGUARD_SIM_GPUS", 1);
    if (sim_physical_count < 0) sim_physical_count = 0;
    if (sim_physical_count > MAX_DEVICES) sim_physical_count = MAX_DEVICES;
    sim_memory = (uint64_t)setting("DEVGUARD_SIM_MEMORY_MB", 8192) << 20;
    sim_context_bytes = (uint64_t)setting("DEVGUARD_SIM_CONTEXT_MB", 256) << 20;
    const char *capability = getenv("DEVGUARD_SIM_CAPABILITY");
    if (capability) sscanf(capability, "%d.%d", &sim_capability_major, &sim_capability_minor);
    const char *log = getenv("DEVGUARD_SIM_LOG");
    if (log && *log) {
        log_fd = open(log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
        if (log_fd < 0 || fstat(log_fd, &log_file)) complain(strerror(errno), log);
    }
    open_state();
}

/* ---- devices that this process sees ---- */

void sim_uuid(int physical, unsigned char uuid[16])
{
    memset(uuid, 0, 16);
    memcpy(uuid, "devguard", 8);
    uuid[15] = physical;
}

void sim_uuid_text(int physical, char text[48])
{
    unsigned char uuid[16];
    sim_uuid(physical, uuid);
    text += sprintf(text, "GPU-");
    for (int i = 0; i < 16; i++) text += sprintf(text, i == 4 || i == 6 || i == 8 || i == 10 ? "-%02x" : "%02x", uuid[i]);
}

static int named_device(const char *word)
{
    if (!strncmp(word, "GPU-", 4)) { /* A prefix is enough, as with the driver. */
        char uuid[48];
        for (int i = 0; i < sim_physical_count; i++) {
            sim_uuid_text(i, uuid);
            if (!strncmp(uuid, word, strlen(word))) return i;
        }
        return -1;
    }
    char *end;
    long index = strtol(word, &end, 10);
    return end == word || index < 0 || index >= sim_physical_count ? -1 : (int)index;
}

/* An entry that names no device hides itself and all later entries; a device that is named twice hides all devices. */
static void read_visible_devices(void)
{
    const char *text = getenv("CUDA_VISIBLE_DEVICES");
    sim_visible_count = 0;
    if (!text) {
        for (int i = 0; i < sim_physical_count; i++) sim_visible[sim_visible_count++] = i;
        return;
    }
    char copy[1024], *rest;
    snprintf(copy, sizeof copy, "%s", text);
    for (char *word = strtok_r(copy, ",", &rest); word; word = strtok_r(NULL, ",", &rest)) {
        while (*word == ' ') word++;
        for (char *end = word + strlen(word); end > word && end[-1] == ' ';) *--end = 0;
        int device = named_device(word);
        if (device < 0) return;
        if (sim_ordinal_of(device) >= 0) {
            sim_visible_count = 0;
            return;
        }
        sim_visible[sim_visible_count++] = device;
    }
}

int sim_ordinal_of(int physical)
{
    for (int i = 0; i < sim_visible_count; i++)
        if (sim_visible[i] == physical) return i;
    return -1;
}

/* ---- processes ---- */

/* Returns the start time of a process, in clock ticks since boot; 0: no such process, or a zombie, which holds nothing. */
static uint64_t start_time(pid_t pid)
{
    char path[64], text[1024];
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return 0;
    ssize_t length = read(fd, text, sizeof text - 1);
    close(fd);
    if (length <= 0) return 0;
    text[length] = 0;
    char *after = strrchr(text, ')'); /* the command name before it may contain anything */
    if (!after || !after[1] || after[2] == 'Z' || after[2] == 'X') return 0;
    unsigned long long ticks = 0;
    int field = 2;
    for (char *word = strtok_r(after + 1, " ", &after); word; word = strtok_r(NULL, " ", &after))
        if (++field == 22) ticks = strtoull(word, NULL, 10);
    return ticks;
}

int sim_alive(const struct sim_process *process)
{
    pid_t pid = __atomic_load_n(&process->pid, __ATOMIC_SEQ_CST);
    if (pid <= 0) return 0;
    return pid == getpid() ? process == sim_me : start_time(pid) == process->started;
}

static struct sim_process *take_slot(void)
{
    struct sim_process *slot = NULL;
    if (sim_state->taken < MAX_PROCESSES) {
        slot = &sim_state->process[sim_state->taken];
    } else {
        for (int i = 0; i < MAX_PROCESSES; i++) {
            struct sim_process *other = &sim_state->process[i];
            if ((!slot || other->serial < slot->serial) && !sim_alive(other)) slot = other;
        }
    }
    if (!slot) return NULL;
    memset(slot, 0, sizeof *slot);
    slot->devices = sim_physical_count;
    slot->serial = ++sim_state->serial;
    slot->started = start_time(getpid());
    const char *name = getenv("DEVGUARD_SIM_NAME");
    int fd = name && *name ? -1 : open("/proc/self/cmdline", O_RDONLY | O_CLOEXEC);
    if (fd >= 0) {
        ssize_t length = read(fd, slot->command, COMMAND_LENGTH - 1);
        drop_arguments(slot->command, length < 0 ? 0 : (size_t)length);
        close(fd);
    } else if (name) {
        snprintf(slot->command, COMMAND_LENGTH, "%s", name);
    }
    __atomic_store_n(&slot->pid, getpid(), __ATOMIC_SEQ_CST);
    if (slot == &sim_state->process[sim_state->taken]) sim_state->taken++;
    return slot;
}

int sim_initialised(void)
{
    return initialised_by == getpid();
}

cudaError_t sim_initialise(void)
{
    if (initialised_by == getpid()) return sim_visible_count ? cudaSuccess : cudaErrorNoDevice;
    if (initialised_by || state_unusable) return cudaErrorInitializationError;
    pthread_mutex_lock(&sim_lock);
    if (!initialised_by) {
        read_visible_devices(); /* read once: later changes have no effect, as with the driver */
        if (state_fd >= 0) set_lock(state_fd, F_WRLCK);
        sim_me = take_slot();
        if (state_fd >= 0) set_lock(state_fd, F_UNLCK);
        if (sim_me) {
            initialised_by = getpid();
            sim_log("- cuInit visible=%d", sim_visible_count);
        } else {
            complain("all slots are held by live processes; use another state file", "the state file");
        }
    }
    pthread_mutex_unlock(&sim_lock);
    if (!sim_me) return cudaErrorInitializationError;
    return sim_visible_count ? cudaSuccess : cudaErrorNoDevice;
}

uint64_t sim_used_on(int physical)
{
    uint64_t used = 0;
    for (uint32_t i = 0; i < sim_state->taken; i++) {
        struct sim_process *process = &sim_state->process[i];
        uint64_t mine = process->bytes[physical] + ((process->contexts >> physical & 1) ? sim_context_bytes : 0);
        if (mine && sim_alive(process)) used += mine;
    }
    return used;
}
