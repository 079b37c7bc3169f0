/* python.c - reads the Python stack of the calling thread through CPython's public C API, which is looked up at run time.
 *
 * torch releases the GIL around most of its work, and a thread that opens a context may hold locks of the CUDA runtime. Waiting
 * for the GIL here could deadlock with a thread that holds the GIL and waits for such a lock. A thread without the GIL
 * therefore starts a helper thread to take it, and waits for the helper for a limited time (DEVGUARD_TRACE_WAIT_MS): at worst
 * a record has no Python stack. The stack does not change meanwhile, because its thread is waiting here.
 */
#include "trace.h"

#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define WAIT_MS 10000

struct api {
    int (*Py_IsInitialized)(void);
    void *(*PyGILState_GetThisThreadState)(void);
    int (*PyGILState_Ensure)(void);
    void (*PyGILState_Release)(int);
    void *(*PyThreadState_GetFrame)(void *); /* this and the next two return new references */
    void *(*PyFrame_GetBack)(void *);
    void *(*PyFrame_GetCode)(void *);
    int (*PyFrame_GetLineNumber)(void *);
    void *(*PyObject_GetAttrString)(void *, const char *);
    void *(*PyObject_GetItem)(void *, void *);
    void *(*PyImport_GetModule)(void *);
    void *(*PyUnicode_FromString)(const char *);
    void *(*PyUnicode_AsEncodedString)(void *, const char *, const char *);
    char *(*PyBytes_AsString)(void *);
    void *(*PyLong_FromUnsignedLong)(unsigned long);
    void (*PyErr_Clear)(void);
    void (*PyErr_Fetch)(void **, void **, void **);
    void (*PyErr_Restore)(void *, void *, void *);
    int (*PyGC_Disable)(void);
    int (*PyGC_Enable)(void);
    void (*Py_DecRef)(void *); /* accepts NULL */
};

static int find_api(struct api *api)
{
#define FIND(name) (*(void **)&api->name = trace_find(RTLD_DEFAULT, #name))
    return FIND(Py_IsInitialized) && FIND(PyGILState_GetThisThreadState) && FIND(PyGILState_Ensure) &&
           FIND(PyGILState_Release) && FIND(PyThreadState_GetFrame) && FIND(PyFrame_GetBack) && FIND(PyFrame_GetCode) &&
           FIND(PyFrame_GetLineNumber) && FIND(PyObject_GetAttrString) && FIND(PyObject_GetItem) &&
           FIND(PyImport_GetModule) && FIND(PyUnicode_FromString) && FIND(PyUnicode_AsEncodedString) &&
           FIND(PyBytes_AsString) && FIND(PyLong_FromUnsignedLong) && FIND(PyErr_Clear) && FIND(PyErr_Fetch) &&
           FIND(PyErr_Restore) && FIND(PyGC_Disable) && FIND(PyGC_Enable) && FIND(Py_DecRef);
#undef FIND
}

/* Returns whether this thread, which has the given state, holds the GIL. PyGILState_Check would return 1 in every thread once a
 * subinterpreter has existed. */
static int holds_gil(void *state)
{
    void *(*attached)(void);
    *(void **)&attached = trace_find(RTLD_DEFAULT, "PyThreadState_GetUnchecked"); /* 3.13 */
    if (!attached) *(void **)&attached = trace_find(RTLD_DEFAULT, "_PyThreadState_UncheckedGet");
    return attached && attached() == state;
}

/* ---- with the GIL: nothing here runs Python code, so it is not released ---- */

/* Copies the text of a string object into the target and releases the object. */
static void append(const struct api *api, void *object, char *target, size_t size)
{
    void *bytes = object ? api->PyUnicode_AsEncodedString(object, "utf-8", "backslashreplace") : NULL;
    const char *text = bytes ? api->PyBytes_AsString(bytes) : NULL;
    snprintf(target, size, "%s", text ? text : "?");
    api->PyErr_Clear();
    api->Py_DecRef(bytes);
    api->Py_DecRef(object);
}

static void add_frame(const struct api *api, void *frame, struct python_stack *stack)
{
    char file[1024], name[256];
    void *code = api->PyFrame_GetCode(frame);
    void *qualified = api->PyObject_GetAttrString(code, "co_qualname"); /* 3.11 */
    api->PyErr_Clear();
    append(api, api->PyObject_GetAttrString(code, "co_filename"), file, sizeof file);
    append(api, qualified ? qualified : api->PyObject_GetAttrString(code, "co_name"), name, sizeof name);
    api->Py_DecRef(code);
    char *end = stack->text + stack->used;
    size_t room = sizeof stack->text - stack->used;
    int length = snprintf(end, room, "%s%c%d%c%s", file, 0, api->PyFrame_GetLineNumber(frame), 0, name);
    if (stack->frames == MAX_FRAMES || length < 0 || (size_t)length + 1 > room) {
        stack->omitted++;
        return;
    }
    stack->used += length + 1;
    stack->frames++;
}

static void read_thread_name(const struct api *api, unsigned long ident, struct python_stack *stack)
{
    void *name = api->PyUnicode_FromString("threading"), *found = NULL;
    void *module = name ? api->PyImport_GetModule(name) : NULL; /* NULL unless it was imported */
    void *active = module ? api->PyObject_GetAttrString(module, "_active") : NULL;
    void *key = active ? api->PyLong_FromUnsignedLong(ident) : NULL;
    void *thread = key ? api->PyObject_GetItem(active, key) : NULL;
    if (thread) found = api->PyObject_GetAttrString(thread, "_name"); /* `name` is a property, which would run Python code */
    api->PyErr_Clear();
    if (found) append(api, found, stack->thread, sizeof stack->thread);
    void *taken[] = { name, module, active, key, thread };
    for (size_t i = 0; i < sizeof taken / sizeof *taken; i++) api->Py_DecRef(taken[i]);
}

static void read_stack(const struct api *api, void *state, unsigned long ident, struct python_stack *stack)
{
    void *error[3];
    int collects = api->PyGC_Disable(); /* up to 3.11 a new frame object may start a collection, which runs any code */
    api->PyErr_Fetch(&error[0], &error[1], &error[2]);
    void *frame = api->PyThreadState_GetFrame(state);
    while (frame) {
        void *outer = api->PyFrame_GetBack(frame);
        add_frame(api, frame, stack);
        api->Py_DecRef(frame);
        frame = outer;
    }
    read_thread_name(api, ident, stack);
    api->PyErr_Restore(error[0], error[1], error[2]);
    if (collects) api->PyGC_Enable();
    stack->missing = stack->frames ? NULL : "this thread is not running Python code";
}

/* ---- without the GIL: a helper thread ---- */

enum stage { WAITING, READING, READ, ABANDONED };
struct request {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    enum stage stage;
    int holders; /* threads that use the request; the last one frees it */
    struct api api;
    void *state;
    unsigned long ident;
    struct python_stack stack;
};

/* Gives up the calling thread's use of the request. The caller holds the lock. */
static void leave(struct request *request)
{
    int left = --request->holders;
    pthread_mutex_unlock(&request->lock);
    if (left) return;
    pthread_cond_destroy(&request->changed);
    pthread_mutex_destroy(&request->lock);
    free(request);
}

static int advance(struct request *request, enum stage from, enum stage to)
{
    pthread_mutex_lock(&request->lock);
    int fits = request->stage == from;
    if (fits) request->stage = to;
    pthread_cond_signal(&request->changed);
    pthread_mutex_unlock(&request->lock);
    return fits;
}

static void *help(void *argument)
{
    struct request *request = argument;
    int held = request->api.PyGILState_Ensure(); /* does not return if the interpreter shuts down first */
    if (advance(request, WAITING, READING)) {
        read_stack(&request->api, request->state, request->ident, &request->stack);
        advance(request, READING, READ);
    }
    request->api.PyGILState_Release(held);
    pthread_mutex_lock(&request->lock);
    leave(request);
    return NULL;
}

static int start_helper(struct request *request)
{
    pthread_t thread;
    pthread_attr_t attributes;
    sigset_t all, before;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    sigfillset(&all); /* the program's own threads must handle its signals */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&thread, &attributes, help, request);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return !error;
}

static void ask_helper(const struct api *api, void *state, struct python_stack *stack)
{
    const char *setting = getenv("DEVGUARD_TRACE_WAIT_MS");
    long wait = setting && *setting ? strtol(setting, NULL, 10) : WAIT_MS;
    struct request *request = calloc(1, sizeof *request);
    if (!request) return;
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&request->changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    pthread_mutex_init(&request->lock, NULL);
    request->api = *api;
    request->state = state;
    request->ident = (unsigned long)pthread_self();
    request->holders = 2;

    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += wait / 1000 + (until.tv_nsec + wait % 1000 * 1000000) / 1000000000;
    until.tv_nsec = (until.tv_nsec + wait % 1000 * 1000000) % 1000000000;
    int started = start_helper(request), error = 0;
    pthread_mutex_lock(&request->lock);
    if (!started) request->holders--;
    while (started && !error && request->stage != READ)
        error = pthread_cond_timedwait(&request->changed, &request->lock, &until);
    if (request->stage == READ) *stack = request->stack;
    else stack->missing = started ? "another thread holds the GIL" : "no thread could be started to take the GIL";
    if (request->stage == WAITING) request->stage = ABANDONED;
    leave(request);
}

void trace_python(struct python_stack *stack)
{
    struct api api;
    memset(stack, 0, offsetof(struct python_stack, text));
    stack->missing = "this process has no Python";
    if (!find_api(&api) || !api.Py_IsInitialized()) return;
    stack->missing = "this is not a Python thread";
    void *state = api.PyGILState_GetThisThreadState();
    if (!state) return;
    stack->missing = "out of memory";
    if (holds_gil(state)) read_stack(&api, state, (unsigned long)pthread_self(), stack);
    else ask_helper(&api, state, stack);
}
