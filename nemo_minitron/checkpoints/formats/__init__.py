"""A folder for each format of checkpoints, what all of them have in common (`base`), and the table of them (`table`).

A format imports storage and the modules beside this folder; formats do not import each other. A new one is a folder
here with a Format in it, its line in the table, and its line in config's table of what settings call it.
"""
