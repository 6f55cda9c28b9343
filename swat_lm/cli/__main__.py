"""`python -m swat_lm.cli`, as torchrun starts it."""

from swat_lm.cli import main

main()
