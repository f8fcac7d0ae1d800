"""One file per command of the terminal.

A command is a module with `EXAMPLES`, at least two complete lines for its `--help`, and `run`, whose
docstring is its help and whose parameters are its options. Heavy imports stand inside `run`, so that
`lowbit --help` answers at once. `cli.py` lists the modules.
"""
