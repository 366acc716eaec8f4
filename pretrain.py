"""Pretrain a GPT. `python pretrain.py --help` lists all flags; start it with torchrun on more than one GPU."""

import signal
import sys

from megatron_mup.training.main import main

if __name__ == "__main__":
    if {"-h", "--help", "--print-config"} & set(sys.argv):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` may have seen enough
    sys.exit(main(sys.argv[1:]))
