"""The command line: `main` runs a command, `arguments` reads what is given, `help` and `reference` say what it takes,
`dry_run` what it would do.

What a command is stands in `nemo_minitron.config.commands`. This room parses arguments, prints, and turns errors into
exit codes. It may import everything below it; stages are imported by name when their command runs.
"""
