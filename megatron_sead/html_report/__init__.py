"""``report.html``: runs as one file that one can look at, mail and print. From run directories alone, whatever state
they are in.

run_directory.py   what a directory holds, as plain values; what is missing or damaged, as sentences
findings.py        what looks wrong, by rules with thresholds
figures.py         curves of a run; token_figures.py: of the tokens of chosen steps
token_view.py      rollouts token by token, as many as the file may hold
comparison.py      several runs: bands over seeds, differences with intervals; tables.py: to copy into a paper
page.py            all of it as HTML, with assets/
write.py           the file, which replaces only what was written here
"""
