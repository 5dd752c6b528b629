"""WebDataset tar shards, local or at any fsspec URL."""

from __future__ import annotations

import itertools
import json
import os
import re
import tarfile

import numpy as np

from openjepa.data.sources import EXTENSIONS, Source, expand_local, stamp
from openjepa.errors import UserError


class Shards(Source):
    """WebDataset tar shards, local or at any fsspec URL: files that share a stem are one sample.

    `.cls` (a number) or `.json` with a `label` gives the label. Shards are indexed once, then read at random.
    """

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self.urls = [url for braces in expand_braces(spec) for url in expand_local(braces)]
        self.entries: list[tuple[int, int, int, str]] = []  # shard, offset, size, name
        found: list[int | None] = []
        for number, url in enumerate(self.urls):
            for key, image, label in index_tar(url):
                self.entries.append((number, *image, key))
                found.append(label)
        if not self.entries:
            raise UserError(f"data '{spec}': no images in these shards (looked for {', '.join(sorted(EXTENSIONS))})")
        self.labels, self.classes = {}, {}
        if all(label is not None and label >= 0 for label in found):
            self.labels["label"] = np.array(found, dtype=np.int64)
            self.classes["label"] = [str(i) for i in range(int(self.labels["label"].max()) + 1)]

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, index: int) -> bytes:
        shard, offset, size, _ = self.entries[index]
        if "://" not in self.urls[shard]:
            with open(self.urls[shard], "rb", buffering=0) as local:
                return os.pread(local.fileno(), size, offset)
        import fsspec

        with fsspec.open(self.urls[shard], "rb", cache_type="none") as file:
            file.seek(offset)
            return bytes(file.read(size))

    def stamps(self) -> list[str]:
        """Of local shards; of remote ones the sizes of their images."""
        local = [stamp(url) for url in self.urls if "://" not in url]
        return local or [str(size) for _, _, size, _ in self.entries]

    def name(self, index: int) -> str:
        shard, *_, key = self.entries[index]
        return f"{self.urls[shard]}/{key}"


def index_tar(url: str) -> list[tuple[str, tuple[int, int], int | None]]:
    """The samples of one shard: (key, (offset, size) of the image, label or None)."""
    import fsspec

    images: dict[str, tuple[int, int, str]] = {}
    labels: dict[str, int] = {}
    try:
        with fsspec.open(url, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                folder, base = os.path.split(member.name)
                stem, _, ending = base.partition(".")  # the WebDataset rule: up to the first dot
                key = os.path.join(folder, stem)
                if not member.isfile() or base.startswith("."):
                    continue
                if f".{ending.lower()}" in EXTENSIONS:
                    images[key] = (member.offset_data, member.size, member.name)
                elif ending in ("cls", "json"):
                    content = tar.extractfile(member)
                    assert content is not None
                    try:
                        value = json.loads(content.read())
                    except ValueError:
                        continue  # a class by name, or damage: no number
                    value = value.get("label") if isinstance(value, dict) else value
                    if isinstance(value, int):
                        labels[key] = value
    except (OSError, tarfile.TarError, ValueError, ImportError) as error:
        raise UserError(f"data '{url}': {str(error) or type(error).__name__}") from error
    return [(name, (offset, size), labels.get(key)) for key, (offset, size, name) in images.items()]


def expand_braces(spec: str) -> list[str]:
    """shard-{0000..0003}.tar and a-{x,y}.tar to all they name."""
    match = re.search(r"\{([^{}]*)\}", spec)
    if not match:
        return [spec]
    inner = match.group(1)
    if bounds := re.fullmatch(r"(\d+)\.\.(\d+)", inner):
        first, last = bounds.groups()
        if int(first) > int(last):
            raise UserError(f"data '{spec}': the range {{{inner}}} runs backwards")
        options = [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
    else:
        options = inner.split(",")
    head, tail = spec[: match.start()], spec[match.end() :]
    return list(itertools.chain.from_iterable(expand_braces(head + option + tail) for option in options))
