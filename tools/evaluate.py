"""As ``sead evaluate``: ``python tools/evaluate.py --model DIR --benchmark math500=FILE --output DIR``."""

from megatron_sead.commands.evaluate import app

if __name__ == "__main__":
    app()
