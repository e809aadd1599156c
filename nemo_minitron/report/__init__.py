"""A run as a page and as pictures: `minitron report`.

Reads the manifests that stages leave, and imports none of the stages.
"""
