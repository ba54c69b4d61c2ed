"""As ``sead prepare``: ``python tools/prepare_prompts.py --input FILE_OR_HUB_NAME --output FILE.jsonl``."""

from megatron_sead.commands.prepare import app

if __name__ == "__main__":
    app()
