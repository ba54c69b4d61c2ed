"""Runs whose layout the plan chooses: "ranks=64 best=3 batch=1024" becomes three runs. No torch here."""

from __future__ import annotations

from dataclasses import replace

from megatron_sead.config.run import RunConfig
from megatron_sead.errors import UserError
from megatron_sead.planning.candidates import Cluster, Pair
from megatron_sead.planning.search import search
from megatron_sead.scaling.study import SHORT, Study, parse_run, parse_wish

WORD = {key: word for word, key in SHORT.items()}


def has_wishes(study: Study) -> bool:
    """Does it name runs whose layout the plan chooses?"""
    return any(parse_wish(text) for texts in study.runs.lists().values() for text in texts)


def chosen(study: Study, base: RunConfig, pair: Pair, cluster: Cluster) -> Study:
    """The study with every wish replaced by runs that the plan ranks highest.

    Args:
        base: whose settings a run varies; with engine replay the plan chooses no engine.
        cluster: its number of ranks is replaced by each wish's.

    Where no layout of so many ranks fits, or other settings do not go together, the wish is left out, with a note on
    stdout.
    """
    lists = {
        name: [chosen_text for text in texts for chosen_text in _chosen(text, base, pair, cluster)]
        for name, texts in study.runs.lists().items()
    }
    return study.model_copy(update={"runs": study.runs.model_copy(update=lists)})


def _chosen(text: str, base: RunConfig, pair: Pair, cluster: Cluster) -> list[str]:
    wish = parse_wish(text)
    if wish is None:
        return [text]
    said = parse_run(wish.rest)
    kept = {key: value for key, value in said.settings.items() if not key.startswith("parallel.")}
    world = replace(cluster, world=wish.ranks)
    try:
        config = replace(said, settings=kept).config(base)
        found = search(config, pair, world, best_only=wish.best == 1)
    except UserError as error:
        print(f"note: {text}: {str(error).splitlines()[0]}")
        return []
    runs = []
    for candidate in found.candidates[: wish.best]:
        replay = config.rollouts.recorded is not None
        settings = [s for s in candidate.settings if not (replay and s.startswith("rollouts."))]
        runs.append(parse_run(f"{wish.rest} dp={candidate.replicas} {_words(settings)}").text)
    return runs


def _words(settings: list[str]) -> str:
    """In short, where there is a word; what says nothing is left out."""
    found = []
    for setting in settings:
        key, _, value = setting.partition("=")
        if value != "null" or not key.startswith("parallel."):
            found.append(f"{WORD.get(key, key)}={value}")
    return " ".join(found)
