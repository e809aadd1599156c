"""NeMo-2 directories: what their context says and how it is written, and NeMo's own objects for an architecture."""
