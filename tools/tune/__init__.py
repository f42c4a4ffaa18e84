"""Tile tables from measurements, or without a GPU from compiler reports."""
