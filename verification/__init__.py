"""Checks too heavy for the suite, such as installing a wheel into an empty environment; `make verify` runs them."""
