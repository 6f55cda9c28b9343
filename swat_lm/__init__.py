"""swat-lm: language models whose attention is a sliding window."""
