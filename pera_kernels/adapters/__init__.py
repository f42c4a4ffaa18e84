"""Adapters in models: put in, share inputs, merge, save, load, export, and their optimizer."""
