"""FlashCore's command line in a checkout: ``python cli.py run --B 1 --H 8 --S 512``."""

from flashcore_cupy.cli.commands import main

if __name__ == "__main__":
    main()
