"""`minitron teach` as a script: takes the overrides of NeMo 24.07's documentation, under torchrun as well."""

import sys

from nemo_minitron.cli.main import run

if __name__ == "__main__":
    sys.exit(run("teach", sys.argv[1:]))
