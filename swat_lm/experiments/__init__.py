"""The demo, and later the paper's tables and figures: uses training, evaluation and streaming."""
