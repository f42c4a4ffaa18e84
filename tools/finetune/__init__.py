"""Adapt a small byte-level transformer from Python source to English, with LoRA and with PERA."""
