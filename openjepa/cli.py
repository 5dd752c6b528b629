"""The commands: parse, call, say what went wrong in one line."""

from __future__ import annotations

import argparse
import errno
import os
import sys

from openjepa import __version__
from openjepa.commands import decoding, exchange, looking, measuring, scoring, searching, training
from openjepa.errors import UserError, printable

# What a full, broken or closed disk says, wherever it is said, and one that lies behind a network.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)
NETWORK = (errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED,
           errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH)  # fmt: skip

COMMANDS = {
    "demo": training.demo,
    "pretrain": training.pretrain,
    "evaluate": scoring.evaluate,
    "finetune": scoring.finetune,
    "labels": scoring.labels,
    "decode": decoding.decode,
    "import": exchange.import_,
    "export": exchange.export,
    "embed": searching.embed,
    "search": searching.search,
    "report": looking.report,
    "studio": looking.studio,
    "inspect": looking.inspect,
    "surprise": looking.surprise,
    "pack": training.pack,
    "replay": training.replay,
    "recipes": training.recipes,
    "bench": measuring.bench,
}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="openjepa", description="Self-supervised image representations with I-JEPA.")
    top.add_argument("--version", action="version", version=f"openjepa {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for group in (training, scoring, exchange, looking, decoding, searching, measuring):
        group.add(commands)
    return top


def main() -> None:
    if not any(name.startswith("PYTORCH") and name.endswith("ALLOC_CONF") for name in os.environ):
        # Masks give every step other sizes: a GPU's memory then grows in place instead of falling into pieces.
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    args, rest = parser().parse_known_args()
    try:
        COMMANDS[args.command](args, rest)
    except UserError as error:
        print(f"openjepa: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in DISK + NETWORK:
            raise
        where = f"{error.filename}: " if error.filename else ""
        what = "the network, or the disk behind it" if error.errno in NETWORK else "the disk"
        print(printable(f"openjepa: {where}{error.strerror}: see to {what}, and run the same command"), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("openjepa: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
