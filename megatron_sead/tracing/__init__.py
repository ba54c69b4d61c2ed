"""A training step on a GPU that is not there: the product's code on fake CUDA tensors, acting as any rank of any world.

====================== ================================================================================================
tracing/device.py      a CUDA device in name only: `device_guard.cpp` for C++, torch.cuda's names for Python
tracing/kernels.py     the kernels that a GPU would take where this build of torch would take others
tracing/world.py       process groups that nothing goes through
tracing/weights.py     weights of a model whose config.json alone is there
tracing/shadows.py     real values of small tensors, so that whatever reads one goes on as in a run
tracing/memory.py      live and highest bytes by phase, and who holds them
tracing/collectives.py what ranks send each other: checked, recorded
tracing/in_flight.py   what collectives still read and write: nobody may touch it before they are waited for
tracing/calls.py       collectives of several ranks, compared
tracing/errors.py      what a trace finds
tracing/costs.py       floating-point operations, bytes, and what they take by `planning/rates.yaml`
tracing/watch.py       the mode that sees every operation and tells all of these
tracing/checkpoint.py  saving and resuming, but for files
tracing/repeats.py     operations that ran before, made again for less time
tracing/step.py        builds a run's models as a rank, takes steps, saves and resumes
tracing/extend.py      few layers and micro-batches, and from them all
tracing/report.py      what a trace tells
====================== ================================================================================================
"""
