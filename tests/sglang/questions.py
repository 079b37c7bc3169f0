"""Questions about images for the test of a real server: small pictures, and requests about them over HTTP."""

from __future__ import annotations

import base64
import json
import struct
import urllib.error
import urllib.request
import zlib

from tests.sglang.checkpoint import PROMPT, TOKENS
from tests.sglang.placement import Answer

__all__ = ["ask", "picture", "WITHOUT_PROXY"]

# Ignores the proxy settings of the user's shell.
WITHOUT_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def picture(number: int) -> bytes:
    """Return a small picture as a PNG file; each number has another picture."""
    width, height = 56 + 28 * (number % 4), 56
    shade = [((7 + 5 * number) * x + 11 * y * (1 + number % 3)) % 256 for y in range(height) for x in range(width)]
    lines = b"".join(
        b"\0" + bytes(v for s in shade[y * width : (y + 1) * width] for v in (s, 255 - s, (s * 3 + number * 40) % 256))
        for y in range(height)
    )

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def ask(port: int, image: bytes) -> Answer:
    """Ask a server on this machine about an image, and return its answer, also that of an HTTP error."""
    body = {
        "text": PROMPT,
        "image_data": ["data:image/png;base64," + base64.b64encode(image).decode()],
        "sampling_params": {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True},
        "return_logprob": True,
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with WITHOUT_PROXY.open(request, timeout=180) as reply:
            answer = json.load(reply)
    except urllib.error.HTTPError as error:
        return Answer(error.code, error.read().decode(errors="replace"), ())
    logprobs = tuple(row[0] for row in answer["meta_info"]["output_token_logprobs"])
    return Answer(reply.status, answer["text"], logprobs)
