"""python -m openjepa, and torchrun -m openjepa."""

from openjepa.cli import main

main()
