"""Hugging Face model classes, caches, streams, presets, cost formulas and conversion; `swat_lm` imports them lazily."""
