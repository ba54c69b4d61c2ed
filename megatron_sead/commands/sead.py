"""``sead COMMAND ...``: what `pip install` puts on the path.

One name with subcommands: `sead --help` lists all there is, and no short name of ours (plan, convert) meets another
package's. A command is imported when it is called, so that the list costs nothing.
"""

from __future__ import annotations

import difflib
import importlib
import signal
import sys

COMMANDS = {  # module of megatron_sead.commands: what it does
    "train": "distil a teacher into a student; --check and --dry-run look before",
    "launch": "torchrun for `sead train` on several nodes; takes torchrun's arguments",
    "plan": "layout, parameters and bytes per rank of a run, from both models' config.json alone",
    "prepare": "a training file of a released set: no duplicates, no benchmark problems, no row without an answer",
    "difficulty": "how hard each prompt is for a model, for the curriculum",
    "evaluate": "how often models are right: MATH-500, Minerva, OlympiadBench, AMC, AIME, GSM8K",
    "report": "a run, or several beside each other, as one HTML file: curves, rollouts token by token",
    "scaling": "layouts beside each other on the same rollouts: speed, memory, traffic; tables and plots",
    "convert": "checkpoints from and to Hugging Face; verify, roundtrip, inspect, truncate",
}
USAGE = "usage: sead COMMAND ..., and sead COMMAND --help\n\n" + "".join(
    f"  {name:<12}{what}\n" for name, what in COMMANDS.items()
)


def main() -> None:
    """Run the command that the first argument names. Exit code 2: there is none."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        sys.exit(0 if arguments else 2)
    name, *rest = arguments
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        meant = f"did you mean {near[0]}?" if near else f"must be one of {', '.join(COMMANDS)}"
        print(f"error: sead {name}: no such command; {meant}", file=sys.stderr)
        sys.exit(2)
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:  # Ctrl-C during imports ends the process quietly
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    command = importlib.import_module(f"megatron_sead.commands.{name}")
    if ours and name not in ("train", "launch"):  # which have something to save later, and say so then
        signal.signal(signal.SIGINT, signal.default_int_handler)
    command.app(rest, prog_name=f"sead {name}")


if __name__ == "__main__":
    main()
