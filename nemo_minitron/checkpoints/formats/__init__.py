"""One module or folder for each format of a checkpoint, and the table of them.

A format imports storage and the modules beside this folder; formats do not import each other.
"""
