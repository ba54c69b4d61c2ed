"""As ``sead difficulty``: ``python tools/estimate_difficulty.py --model DIR --prompts FILE --output FILE``."""

from megatron_sead.commands.difficulty import app

if __name__ == "__main__":
    app()
