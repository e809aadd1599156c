"""python -m nemo_minitron: the command `minitron`."""

import sys

from nemo_minitron.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
