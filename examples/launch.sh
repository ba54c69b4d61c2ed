# Sourced by the run scripts: launch CONFIG [key=value ...] [--dry-run] checks a run, then starts its ranks with torchrun.
#
#   NPROC        ranks on this node, one a GPU
#   NNODES       nodes; run the same script on each of them with
#   NODE_RANK    0, 1, ... and, the same on all,
#   MASTER_ADDR  the first node's name or address
#   MASTER_PORT  a free port there (29500)

launch() {
    local config="$1" nodes="${NNODES:-1}" argument
    shift
    for argument in "$@"; do
        if [ "$argument" = --dry-run ]; then
            "$VENV_PYTHON" -m megatron_sead.train --config "$config" --world-size "$((nodes * NPROC))" "$@"
            return
        fi
    done
    # A mistake in settings or files is told in a second, before any rank starts
    "$VENV_PYTHON" -m megatron_sead.train --config "$config" --world-size "$((nodes * NPROC))" --check "$@" || return

    local where=(--standalone)
    if [ "$nodes" -gt 1 ]; then
        where=(
            --nnodes "$nodes"
            --node-rank "${NODE_RANK:?set NODE_RANK to 0 .. $((nodes - 1)), another on each node}"
            --master-addr "${MASTER_ADDR:?set MASTER_ADDR to the name of the first node}"
            --master-port "${MASTER_PORT:-29500}"
        )
    fi
    # torchrun with the same arguments does the same; launch keeps its pages out of a user's one-line mistake
    "$VENV_PYTHON" -m megatron_sead.launch "${where[@]}" --nproc-per-node "$NPROC" \
        -m megatron_sead.train --config "$config" "$@"
}
