"""``python -m megatron_sead.launch <torchrun's arguments>``."""

import os
import signal
import sys

if __name__ == "__main__":
    # Ctrl-C before any rank is there, torch's import included; torchrun's own handlers follow
    signal.signal(signal.SIGINT, lambda *_: os._exit(0))
    from megatron_sead.launch.processes import END_WITH_PARENT, end_with_parent

    if os.environ.pop(END_WITH_PARENT, None):
        end_with_parent()
    from megatron_sead.launch.torchrun import main

    sys.exit(main(sys.argv[1:]))
