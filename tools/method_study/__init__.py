"""A comparison of methods: ``study`` what is asked; ``running`` its runs; ``results`` what came of them."""
