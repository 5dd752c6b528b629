"""The headers of a tar archive, read without its contents. Nothing is ever extracted.

Formats: ustar, GNU (long names) and pax (`path` and `size`). Links, folders and devices are passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

BLOCK = 512  # bytes
LONGEST_EXTENSION = 2**20  # bytes of a pax header or a long name
FILES = b"0\x007"  # types of members that are files; \0 is the oldest way to say it
WITHOUT_CONTENT = b"123456"  # links, devices, folders, pipes
Read = Callable[[int, int], bytes]  # (offset, size) to so many bytes, fewer only where the archive ends


class Damaged(ValueError):
    """An archive that is not one, or ends early; the message says which."""


def members(read: Read, total: int) -> Iterator[tuple[str, int, int]]:
    """The files of an archive of `total` bytes: (name, offset of the content, size), in bytes. Raises Damaged.

    A name may be anything ("../x", "/etc/passwd"): it is a label, and no path that is ever opened.
    """
    offset, path, size_said = 0, None, None
    while header := read(offset, BLOCK):
        if len(header) < BLOCK:
            raise Damaged(f"ends in the middle of a header, at byte {offset + len(header)}")
        if not header.strip(b"\0"):  # the archive's end
            return
        if not sound(header):
            raise Damaged(f"is not a tar archive, or damaged: byte {offset} begins no member")
        kind, content = header[156:157], offset + BLOCK
        size = number(header[124:136])
        if kind in WITHOUT_CONTENT:
            size = 0
        elif kind in FILES and size_said is not None:
            size = size_said
        if size < 0 or content + size > total:
            raise Damaged(f"ends early: the member at byte {offset} has {size} bytes, the archive {total}")
        if kind in b"LxX":
            if size > LONGEST_EXTENSION:
                raise Damaged(
                    f"has a header of {size} bytes at byte {offset}: more than {LONGEST_EXTENSION} are refused"
                )
            said = read(content, size)
            if kind == b"L":
                path = said.rstrip(b"\0")
            else:
                records = pax(said)
                if any(key.startswith(b"GNU.sparse") for key in records):
                    kind = b"S"
                path = records.get(b"path", path)
                size_said = int(records[b"size"]) if b"size" in records else None
        if kind == b"S":
            raise Damaged(f"has a sparse member at byte {offset}: pack it anew without --sparse")
        if kind not in b"LKxXg":
            name = path if path is not None else own_name(header)
            if kind in FILES and not name.endswith(b"/"):
                yield name.decode(errors="surrogateescape"), content, size
            path = size_said = None
        offset = content + -(-size // BLOCK) * BLOCK


def sound(header: bytes) -> bool:
    """Whether a header's checksum is right, of signed bytes or unsigned ones."""
    rest = header[:148] + header[156:]
    found = number(header[148:156])
    unsigned = sum(rest) + 8 * ord(" ")
    return found == unsigned or found == unsigned - 256 * sum(byte > 127 for byte in rest)


def number(field: bytes) -> int:
    """A number in octal digits, or in GNU's base 256; -1 where it is neither."""
    if field[0] in (0o200, 0o377):
        return int.from_bytes(field, signed=True) if field[0] == 0o377 else int.from_bytes(field[1:])
    digits = field.partition(b"\0")[0].strip() or b"0"
    return int(digits, 8) if digits.isdigit() and not set(digits) & set(b"89") else -1


def own_name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def pax(content: bytes) -> dict[bytes, bytes]:
    """The records "LENGTH key=value\\n" of an extended header. Raises Damaged."""
    records = {}
    while content.strip(b"\0"):
        digits, space, _ = content[:20].partition(b" ")
        length = int(digits) if space and digits.isdigit() else 0
        key, equals, value = content[len(digits) + 1 : length].partition(b"=")
        if not equals or not value.endswith(b"\n") or length > len(content):
            raise Damaged("has an extended header that is damaged")
        records[key], content = value[:-1], content[length:]
    if not records.get(b"size", b"0").isdigit() or len(records.get(b"size", b"")) > 18:
        raise Damaged("has an extended header with a size that is no number")
    return records
