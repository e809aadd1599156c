"""Kinds of files that weights lie in, each read and written as plain bytes: no format of a checkpoint is known here."""
