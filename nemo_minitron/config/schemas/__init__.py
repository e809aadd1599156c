"""The dataclasses behind the settings, a module for each command or group of commands.

Fields with their documentation, `problems()` that says what makes them wrong, and nothing that reads a file or imports
an engine.
"""
