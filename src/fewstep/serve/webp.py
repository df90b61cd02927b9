"""The size of a WebP file, from its header alone: the decoder reserves memory for it as soon as it opens a file."""

from __future__ import annotations

from PIL import features

_SAFE = (1, 3, 2)
"""First version of libwebp without the heap overflow of CVE-2023-4863."""


def is_safe() -> bool:
    """Whether Pillow has a decoder that may be given files of strangers."""
    version = features.version("webp") if features.check("webp") else None
    return version is not None and tuple(int(part) for part in version.split(".")[:3] if part.isdigit()) >= _SAFE


def size_of(data: bytes) -> tuple[int, int] | None:
    """Width and height; None of a file that is no WebP. ValueError of one whose header is damaged, or that is an animation.

    RFC 9649: the first chunk of a RIFF file of the form WEBP is VP8, VP8L or VP8X.
    """
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return None
    kind, body = data[12:16], data[20:30]
    if len(body) < 10:
        raise ValueError("a WebP file is cut")
    if kind == b"VP8X":
        if body[0] & 2:
            raise ValueError("a WebP file is an animation")
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if kind == b"VP8L" and body[0] == 0x2F:
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 " and body[3:6] == b"\x9d\x01\x2a":
        return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF
    raise ValueError("a WebP file has a damaged header")
