"""Lets SGLang 0.4.6.post2 import beside a Triton of today: it names three functions that Triton has dropped.

They only tell its Triton cache manager where to write, which no test uses. Import this before SGLang.
"""

from __future__ import annotations

import triton.runtime.cache

for _name in ("default_cache_dir", "default_dump_dir", "default_override_dir"):
    if not hasattr(triton.runtime.cache, _name):
        setattr(triton.runtime.cache, _name, None)
