"""Make SGLang 0.4.6.post2 importable with a current Triton, which has dropped three functions that SGLang names.

The functions only name folders for SGLang's Triton cache manager, which no test uses. Import this before SGLang.
"""

from __future__ import annotations

import triton.runtime.cache

for _name in ("default_cache_dir", "default_dump_dir", "default_override_dir"):
    if not hasattr(triton.runtime.cache, _name):
        setattr(triton.runtime.cache, _name, None)
