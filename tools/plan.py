"""As ``sead plan``: ``python tools/plan.py --config FILE [--world-size N] [key=value ...]``."""

from megatron_sead.commands.plan import app

if __name__ == "__main__":
    app()
