/* record.c - writes one record, as a block of text or a line of JSON, with one call of write(2).
 *
 * DEVGUARD_TRACE_OUTPUT names the file; the default is standard error. The file is opened for each record, so that the program
 * can neither close nor inherit a descriptor by mistake. DEVGUARD_TRACE_FORMAT=json selects JSON.
 */
#include "trace.h"

#include "../../support/csrc/process.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct text {
    size_t used;
    char data[128 << 10]; /* frames that do not fit are only counted, by each_frame() */
};

static __thread int reporting;

static void say(struct text *text, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void say(struct text *text, const char *format, ...)
{
    va_list arguments;
    size_t room = sizeof text->data - text->used;
    va_start(arguments, format);
    int length = vsnprintf(text->data + text->used, room, format, arguments);
    va_end(arguments);
    if (length > 0 && (size_t)length < room) text->used += length;
}

static void quote(struct text *text, const char *string)
{
    say(text, "\"");
    for (const unsigned char *c = (const unsigned char *)string; *c; c++) {
        if (*c == '"' || *c == '\\') say(text, "\\%c", *c);
        else if (*c < 32) say(text, "\\u%04x", *c);
        else say(text, "%c", *c);
    }
    say(text, "\"");
}

static void member(struct text *text, const char *name, const char *string)
{
    say(text, ", \"%s\": ", name);
    if (string && *string) quote(text, string);
    else say(text, "null");
}

static void format_uuid(const unsigned char *uuid, char result[48])
{
    *result = 0;
    if (!uuid) return;
    result += sprintf(result, "GPU-");
    for (int i = 0; i < 16; i++) result += sprintf(result, i == 4 || i == 6 || i == 8 || i == 10 ? "-%02x" : "%02x", uuid[i]);
}

/* Writes each frame that leaves room for the rest of the record, and returns the number of frames left out. */
static int each_frame(struct text *text, const struct python_stack *stack,
                      void (*write_frame)(struct text *, int, const char *, const char *, const char *))
{
    const char *next = stack->text;
    int i = 0;
    for (; i < stack->frames; i++) {
        const char *file = next, *line = file + strlen(file) + 1, *function = line + strlen(line) + 1;
        next = function + strlen(function) + 1;
        if (text->used + 6 * (size_t)(next - file) + 1024 > sizeof text->data) break;
        write_frame(text, i, file, line, function);
    }
    return stack->frames - i + stack->omitted;
}

/* ---- JSON ---- */

static void json_frame(struct text *text, int i, const char *file, const char *line, const char *function)
{
    say(text, "%s{\"file\": ", i ? ", " : "");
    quote(text, file);
    say(text, ", \"line\": %s, \"function\": ", line);
    quote(text, function);
    say(text, "}");
}

static void write_json(struct text *text, const struct context *context, const char *uuid)
{
    const struct native_stack *native = &context->native;
    say(text, "{\"device\": %d, \"pid\": %d, \"tid\": %d", context->device, native->pid, native->tid);
    member(text, "uuid", uuid);
    member(text, "kind", context->kind);
    member(text, "command", native->command);
    member(text, "thread", native->thread);
    member(text, "python_thread", context->python.thread);
    member(text, "call", native->call);
    member(text, "library", native->asker);
    member(text, "function", native->function);
    say(text, ", \"libraries\": [");
    for (const char *name = native->libraries; *name; name += strlen(name) + 1) {
        if (name != native->libraries) say(text, ", ");
        quote(text, name);
    }
    say(text, "]");
    member(text, "no_stack", context->python.missing);
    say(text, ", \"stack\": [");
    int omitted = each_frame(text, &context->python, json_frame);
    say(text, "], \"omitted\": %d}\n", omitted);
}

/* ---- text ---- */

static void text_frame(struct text *text, int i, const char *file, const char *line, const char *function)
{
    (void)i;
    say(text, "    %s:%s %s\n", file, line, function);
}

static void write_text(struct text *text, const struct context *context, const char *uuid)
{
    const struct native_stack *native = &context->native;
    const struct python_stack *python = &context->python;
    say(text, "devguard: context on device %d%s%s%s%s, opened by pid %d (%s)\n", context->device, *uuid ? " (" : "", uuid,
        *uuid ? ")" : "", strcmp(context->kind, "primary") ? ", not the primary one" : "", native->pid, native->command);
    say(text, "  thread %d '%s'", native->tid, native->thread);
    if (*python->thread) say(text, ", Python thread '%s'", python->thread);
    say(text, "\n  call %s, by %s%s%s\n", native->call, *native->asker ? native->asker : "an unknown library",
        *native->function ? ": " : "", native->function);
    if (*native->libraries) {
        const char *before = "  libraries, innermost first: ";
        for (const char *name = native->libraries; *name; name += strlen(name) + 1) {
            say(text, "%s%s", before, name);
            before = ", ";
        }
        say(text, "\n");
    }
    if (python->missing) {
        say(text, "  no Python stack: %s\n", python->missing);
        return;
    }
    say(text, "  Python stack, innermost first:\n");
    int omitted = each_frame(text, python, text_frame);
    if (omitted) say(text, "    ... and %d more\n", omitted);
}

/* ---- output ---- */

static __attribute__((constructor)) void load(void)
{
    look_for_stderr();
}

static void write_out(const char *data, size_t length)
{
    const char *path = getenv("DEVGUARD_TRACE_OUTPUT");
    int named = path && *path, fd = named ? open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600) : standard_error();
    while (fd >= 0 && length) {
        ssize_t written = write(fd, data, length);
        if (written < 0 && errno == EINTR) continue;
        if (written < 0 && errno == EAGAIN) { /* a full non-blocking pipe: give its reader a second */
            struct pollfd pipe = { fd, POLLOUT, 0 };
            if (poll(&pipe, 1, 1000) > 0) continue;
        }
        if (written <= 0) break;
        data += written;
        length -= written;
    }
    if (named && fd >= 0) close(fd);
}

void trace_report(const char *kind, int device, const unsigned char *uuid, const char *call)
{
    if (reporting) return;
    reporting = 1;
    int error = errno;
    struct context *context = malloc(sizeof *context);
    struct text *text = malloc(sizeof *text);
    if (context && text) {
        char name[48];
        const char *format = getenv("DEVGUARD_TRACE_FORMAT");
        context->kind = kind;
        context->device = device;
        format_uuid(uuid, name);
        trace_native(&context->native, call);
        trace_python(&context->python);
        text->used = 0;
        if (format && !strcmp(format, "json")) write_json(text, context, name);
        else write_text(text, context, name);
        write_out(text->data, text->used);
    }
    free(context);
    free(text);
    errno = error;
    reporting = 0;
}
