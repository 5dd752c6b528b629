"""WebDataset tar shards, local or at any fsspec URL."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from typing import Any

from openjepa.data.decode import Raw
from openjepa.data.index import MOST_CLASSES, About, Index, folder_of, open_index, read_about
from openjepa.data.sources import Source, expand_local, refuse_large
from openjepa.data.store import about, ahead, is_remote, patiently, read_range
from openjepa.data.tar import BLOCK, number
from openjepa.errors import UserError

OPEN = 64  # shards that one process holds open
MOST_SHARDS, MOST_BRACES = 2**17, 16


class Shards(Source):
    """WebDataset tar shards, local or at any fsspec URL: files that share a stem are one sample.

    `.cls` (a number) or `.json` with a `label` gives the label. Shards are indexed once, then read at random. One that cannot
    be read is no damaged image: after some tries it is a UserError.
    """

    @classmethod
    def from_spec(cls, spec: str) -> Shards:
        return cls([url for braces in expand_braces(spec) for url in expand_local(braces)])

    def __init__(self, urls: list[str]) -> None:
        said = read_about(folder_of(urls[0]))
        self._build(urls, said, open_index(urls, said))

    def _build(self, urls: list[str], said: About | None, index: Index) -> None:
        self.urls, self.said, self.index = urls, said, index
        self.labels, self.classes = {}, {}
        self.whole = said is not None and said.whole
        for t, task in enumerate(index.tasks):
            labels = index.labels[:, t]
            if labels.min() < 0:
                continue
            if (count := int(labels.max()) + 1) > MOST_CLASSES:
                raise UserError(f"{index.file} is damaged: remove it, it is made anew")
            names = said.classes[task] if said else [str(i) for i in range(count)]
            if count > len(names):
                raise UserError(
                    f"data '{urls[0]}': label {count - 1} of '{task}' has no name among {len(names)} classes"
                )
            self.labels[task], self.classes[task] = labels, names
        self._open = lru_cache(OPEN)(Opened)

    def __getstate__(self) -> dict[str, Any]:
        """Workers started afresh map the index again."""
        return {"urls": self.urls, "said": self.said, "file": self.index.file}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._build(state["urls"], state["said"], Index(state["file"]))

    def __len__(self) -> int:
        return len(self.index.samples)

    def read(self, index: int) -> bytes:
        offset, size, url = self._place(index)
        refuse_large(size)
        if is_remote(url):
            both = read_range(url, offset - BLOCK, offset + size)
            header, content = both[:BLOCK], both[BLOCK:]
            refuse_changed(header, size, url)
            return content
        return patiently(url, partial(self._read_local, url, offset, size))

    def _place(self, index: int) -> tuple[int, int, str]:
        """Where an image begins, its size in bytes, and in which shard."""
        offset, size, shard, _ = self.index.samples[index].item()
        if not (0 <= shard < len(self.urls) and size >= 0 and offset >= BLOCK):
            raise UserError(f"{self.index.file} is damaged: remove it, it is made anew")
        return offset, size, self.urls[shard]

    def _read_local(self, url: str, offset: int, size: int) -> bytes:
        try:
            file = self._open(url).descriptor
            header, content = os.pread(file, BLOCK, offset - BLOCK), os.pread(file, size, offset)
            if len(content) < size:
                raise OSError(f"it ends early, at byte {offset + len(content)}: it was cut short since it was indexed")
        except OSError:
            self._open.cache_clear()  # the next try opens it anew
            raise
        refuse_changed(header, size, url)
        return content

    def reads(self, indices: Iterable[int]) -> Iterator[Callable[[], Raw]]:
        calls = super().reads(indices)
        return ahead(calls) if any(map(is_remote, self.urls)) else calls

    def stamps(self) -> list[str]:
        return [found()[1] for found in ahead(partial(about, url) for url in self.urls)]

    def name(self, index: int) -> str:
        return f"{self._place(index)[2]}/{self.index.name(index)}"


class Opened:
    """An open file, closed with the last that reads it."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def refuse_changed(header: bytes, size: int, url: str) -> None:
    """Raises UserError unless a member of this size begins with the header."""
    if number(header[124:136]) != size:
        raise UserError(f"{url} has changed since it was indexed: start again")


def expand_braces(spec: str) -> list[str]:
    """shard-{0000..0003}.tar and a-{x,y}.tar to all they name. Raises UserError for more than MOST_SHARDS."""
    match = re.search(r"\{([^{}]*)\}", spec)
    if not match:
        return [spec]
    if spec.count("{") > MOST_BRACES:
        raise UserError(f"data '{spec}': has more than {MOST_BRACES} braces")
    inner = match.group(1)
    options: Iterable[str]
    if bounds := re.fullmatch(r"([0-9]{1,18})\.\.([0-9]{1,18})", inner):
        first, last = bounds.groups()
        if int(first) > int(last):
            raise UserError(f"data '{spec}': the range {{{inner}}} runs backwards")
        options = (str(i).zfill(len(first)) for i in range(int(first), int(last) + 1))
    else:
        options = inner.split(",")
    head, tail = spec[: match.start()], spec[match.end() :]
    found = itertools.chain.from_iterable(expand_braces(head + option + tail) for option in options)
    names = list(itertools.islice(found, MOST_SHARDS + 1))
    if len(names) > MOST_SHARDS:
        raise UserError(f"data '{spec}': names more than {MOST_SHARDS} shards")
    return names
