"""Generates the C source of stub libraries (cuBLAS, cuDNN, NCCL and others) that do nothing and report success.

Functions that create something return a dummy handle, and version queries return a plausible version. With
DEVGUARD_SIM_TRACE=1 the stubs name every call on standard error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["stub_source"]

PRELUDE = """\
#include <stdio.h>
#include <stdlib.h>
static long called(const char *name)
{
    if (getenv("DEVGUARD_SIM_TRACE")) fprintf(stderr, "devguard simulated GPUs: stub %s\\n", name);
    return 0;
}
static long created(const char *name, void **handle)
{
    called(name);
    if (handle) *handle = calloc(1, 4096);
    return 0;
}
"""
SPECIAL = {
    "nvshmemid_init_status": "int {name}(void) {{ return 0; }}",
    "cudnnGetVersion": "long {name}(void) {{ return 91900; }}",
    "cudnnGetCudartVersion": "long {name}(void) {{ return 13000; }}",
    "cudnnGetProperty": "long {name}(int n, int *value) {{ *value = n == 0 ? 9 : n == 1 ? 19 : 0; return 0; }}",
    "cudnnBackendCreateDescriptor": 'long {name}(int type, void **handle) {{ return created("{name}", handle); }}',
    "ncclGetVersion": "long {name}(int *value) {{ *value = 22809; return 0; }}",
    "cufftGetVersion": "long {name}(int *value) {{ *value = 12000; return 0; }}",
    # torch warns if no algorithm is found; the last argument returns the number found.
    "cublasLtMatmulAlgoGetHeuristic": (
        "long {name}(void *a, void *b, void *c, void *d, void *e, void *f, void *g, int wanted, void "
        "*results, int *found) "
        "{{ *found = 1; return 0; }}"
    ),
    "cublasGetVersion_v2": "long {name}(void *handle, int *value) {{ *value = 130000; return 0; }}",
}
TEXT = re.compile("GetErrorString|GetStatusString|GetStatusName|GetLastError")


def stub_source(library: str, symbols: Iterable[str]) -> str:
    """Return the C source of a library that defines these symbols.

    Parameters
    ----------
    library : str
        The soname of the library.
    symbols : iterable of str
        The names of the functions.
    """
    lines = []
    for name in sorted(symbols):
        if name in SPECIAL:
            form = SPECIAL[name]
        elif TEXT.search(name):
            form = 'const char *{name}(void) {{ return "simulated GPU: no such library"; }}'
        elif "Create" in name and not library.startswith("libcufft"):  # cufftCreate's handle is an int
            form = 'long {name}(void **handle) {{ return created("{name}", handle); }}'
        else:
            form = 'long {name}(void) {{ return called("{name}"); }}'
        lines.append(form.format(name=name) + "\n")
    return PRELUDE + "".join(lines)
