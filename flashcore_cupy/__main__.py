"""``python -m flashcore_cupy``: the command line, where its script is not on the PATH."""

from flashcore_cupy.cli.commands import main

if __name__ == "__main__":  # worker processes import this file, too
    main()
