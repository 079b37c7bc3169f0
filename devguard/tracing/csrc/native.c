/* native.c - finds the thread, the library and the C call that opened the context. */
#include "trace.h"

#include "../../support/csrc/process.h"

#include <dlfcn.h>
#include <execinfo.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MAX_NATIVE_FRAMES 96

const char *trace_file_name(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

int trace_is_own(const void *address)
{
    Dl_info own, other;
    return dladdr((void *)trace_is_own, &own) && dladdr(address, &other) && own.dli_fbase == other.dli_fbase;
}

static int is_cuda(const char *path)
{
    const char *name = trace_file_name(path);
    return !strncmp(name, "libcuda.so", 10) || !strncmp(name, "libcudart", 9);
}

/* Demangles C++ names if the C++ library is loaded, as it is wherever torch is. */
static void copy_function(char *target, size_t size, const char *symbol)
{
    char *readable = NULL;
    void *library = strncmp(symbol, "_Z", 2) ? NULL : dlopen("libstdc++.so.6", RTLD_LAZY | RTLD_NOLOAD);
    if (library) {
        typedef char *(*demangler)(const char *, char *, size_t *, int *);
        demangler demangle = (demangler)trace_find(library, "__cxa_demangle");
        int status = -1;
        if (demangle) readable = demangle(symbol, NULL, NULL, &status);
        dlclose(library);
    }
    snprintf(target, size, "%s", readable ? readable : symbol);
    free(readable);
}

static void walk(struct native_stack *stack)
{
    void *frames[MAX_NATIVE_FRAMES];
    int count = backtrace(frames, MAX_NATIVE_FRAMES), found = 0;
    size_t used = 0;
    const char *last = "";
    for (int i = 0; i < count; i++) {
        Dl_info info;
        char *address = (char *)frames[i] - 1; /* inside the call: the return address may belong to the next function */
        if (!dladdr(address, &info) || !info.dli_fname || trace_is_own(address)) continue;
        const char *name = trace_file_name(info.dli_fname);
        if (!found && is_cuda(info.dli_fname)) { /* the outermost CUDA frame is the call */
            if (info.dli_sname && !strncmp(info.dli_sname, "cu", 2))
                snprintf(stack->call, sizeof stack->call, "%s", info.dli_sname);
            continue;
        }
        if (!found) {
            snprintf(stack->asker, sizeof stack->asker, "%s", info.dli_fname);
            if (info.dli_sname) copy_function(stack->function, sizeof stack->function, info.dli_sname);
            found = 1;
        }
        size_t length = strlen(name) + 1;
        if (strcmp(name, last) && used + length + 1 < sizeof stack->libraries) {
            memcpy(stack->libraries + used, name, length);
            used += length;
            last = name;
        }
    }
}

static void read_text(const char *path, char *text, size_t size, int command)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t length = fd < 0 ? -1 : read(fd, text, size - 1);
    if (fd >= 0) close(fd);
    if (length < 0) length = 0;
    text[length] = 0;
    if (command) length = (ssize_t)drop_arguments(text, (size_t)length);
    while (length > 0 && (!text[length - 1] || text[length - 1] == '\n')) text[--length] = 0;
    for (ssize_t i = 0; i < length; i++)
        if (!text[i]) text[i] = ' '; /* the kernel separates the words of a command line with NUL */
}

void trace_native(struct native_stack *stack, const char *call)
{
    char path[64];
    memset(stack, 0, sizeof *stack);
    stack->pid = getpid();
    stack->tid = (pid_t)syscall(SYS_gettid);
    snprintf(path, sizeof path, "/proc/self/task/%d/comm", stack->tid);
    read_text(path, stack->thread, sizeof stack->thread, 0);
    read_text("/proc/self/cmdline", stack->command, sizeof stack->command, 1);
    snprintf(stack->call, sizeof stack->call, "%s", call);
    walk(stack);
}
