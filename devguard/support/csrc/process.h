/* process.h - what the libraries of simgpu/ and tracing/, which other programs preload, must know of their process. */
#ifndef DEVGUARD_PROCESS_H
#define DEVGUARD_PROCESS_H

#include <fcntl.h>
#include <string.h>
#include <unistd.h>

/* ---- standard error ---- */

static int had_stderr;

/* Called when the library is loaded. */
static inline void look_for_stderr(void)
{
    had_stderr = fcntl(STDERR_FILENO, F_GETFD) >= 0;
}

/* Returns standard error, or -1: a file that Python opened under this number, once it was closed, is closed on exec. */
static inline int standard_error(void)
{
    int flags = had_stderr ? fcntl(STDERR_FILENO, F_GETFD) : -1;
    return flags < 0 || flags & FD_CLOEXEC ? -1 : STDERR_FILENO;
}

/* ---- the command line ---- */

/* Drops what follows the program, the options of Python and the script or module: other words, and code, may hold secrets. */
static inline size_t drop_arguments(char *words, size_t length)
{
    static const char child[] = "multiprocessing";
    const char *slash = strrchr(words, '/');
    size_t at = strlen(words) + 1;
    int done = strncmp(slash ? slash + 1 : words, "python", 6) != 0;
    while (!done && at < length) {
        const char *word = words + at;
        size_t size = strlen(word);
        int flags = word[0] == '-' && size > 1 && word[1] != '-' && word[1] != 'W' && word[1] != 'X';
        int has_value = !strcmp(word, "-W") || !strcmp(word, "-X");
        done = word[0] != '-' || (flags && (word[size - 1] == 'c' || word[size - 1] == 'm'));
        at += size + 1;
        if (flags && word[size - 1] == 'c' && at < length && strstr(words + at, child)) {
            memcpy(words + at, child, sizeof child);
            at += sizeof child;
        } else if (at < length && (has_value || (flags && word[size - 1] == 'm'))) {
            at += strlen(words + at) + 1;
        }
    }
    if (at > length + 1) at = length + 1;
    if (at && at - 1 < length) {
        memset(words + at - 1, 0, length - (at - 1));
        length = at - 1;
    }
    return length;
}

#endif
