"""As ``sead report``: ``python tools/report.py RUN [RUN ...] [--output FILE]``."""

from megatron_sead.commands.report import app

if __name__ == "__main__":
    app()
