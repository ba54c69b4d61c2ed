"""Process groups, the messages between them, and Megatron-Core on a CPU."""
