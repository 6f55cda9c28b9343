"""The demo: SWAT, the paper's slopes and full attention trained on Python's own sources, compared on one page."""
