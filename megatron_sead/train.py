"""``torchrun -m megatron_sead.train --config FILE [key=value ...]``: the entry point of every rank."""

import signal

if __name__ == "__main__":  # Ctrl-C ends a rank at once and quietly, until there is something to save
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from megatron_sead.commands.train import app

if __name__ == "__main__":
    app()
