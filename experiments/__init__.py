"""One file per run: its docstring has the command, the cost and the result to expect."""
