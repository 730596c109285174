"""The command line: commands, options, tables, plots."""
