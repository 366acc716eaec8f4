"""Pretrain a GPT. `python pretrain.py --help` lists all flags; start it with torchrun on more than one GPU."""

import sys

from megatron_mup.training.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
