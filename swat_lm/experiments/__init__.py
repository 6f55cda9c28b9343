"""The demo, the paper's tables and figures, and pages that compare runs: uses training and evaluation."""
