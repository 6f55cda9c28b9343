"""The demo: a SWAT model and its full-attention twin trained on Python's own sources, compared on one page."""
