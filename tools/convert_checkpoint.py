"""As ``sead convert``: ``python tools/convert_checkpoint.py COMMAND --help``."""

from megatron_sead.commands.convert import app

if __name__ == "__main__":
    app()
