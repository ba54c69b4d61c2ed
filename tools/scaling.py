"""As ``sead scaling``: ``python tools/scaling.py run --study FILE --output DIR [key=value ...]``."""

from megatron_sead.commands.scaling import app

if __name__ == "__main__":
    app()
