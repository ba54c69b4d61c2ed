"""What `tools/benchmark_loss.py` measures with: inputs, losses, peers, floors, meters, and the report.

Everything but `report` runs in the rank processes, whose Python may be another environment's: it imports torch,
`megatron_sead.distillation` and the peers, no more.
"""
