"""Quantisation and export."""
