"""Before a run: are its files there, and what will it need? Neither torch nor a GPU."""
