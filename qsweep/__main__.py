"""`python -m qsweep`."""

from qsweep.cli.main import main

main()
