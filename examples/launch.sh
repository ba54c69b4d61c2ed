# Sourced by the run scripts: launch CONFIG [key=value ...] [--dry-run|--trace] checks a run, then starts its ranks with torchrun.
#
#   NPROC        ranks on this node, one a GPU
#   NNODES       nodes; run the same script on each of them with
#   NODE_RANK    0, 1, ... and, the same on all,
#   MASTER_ADDR  the first node's name or address
#   MASTER_PORT  a free port there (29500)

absolute() { # PATH: relative ones are meant from where the command was typed, before the script's cd
    case "$1" in
        "" | /* | "~"* | "\$"*) echo "$1" ;; # the run expands ~ and $NAME
        *) echo "$OLDPWD/$1" ;;
    esac
}

require_number() { # NAME LEAST: the variable of that name holds a whole number of at least so much
    if ! [[ "${!1}" =~ ^[0-9]{1,6}$ ]] || [ "$((10#${!1}))" -lt "$2" ]; then
        echo "error: $1='${!1}': must be a whole number of at least $2" >&2
        return 2
    fi
}

launch() {
    local config="$1" nodes argument
    shift
    NNODES="${NNODES:-1}"
    require_number NPROC 1 && require_number NNODES 1 || return
    NPROC="$((10#$NPROC))" nodes="$((10#$NNODES))"
    for argument in "$@"; do
        if [ "$argument" = --dry-run ] || [ "$argument" = --trace ]; then
            "$VENV_PYTHON" -m megatron_sead.train --config "$config" --world-size "$((nodes * NPROC))" "$@"
            return
        fi
    done
    # A mistake in settings or files is told in a second, before any rank starts
    "$VENV_PYTHON" -m megatron_sead.train --config "$config" --world-size "$((nodes * NPROC))" --check "$@" || return

    local where=(--standalone)
    if [ "$nodes" -gt 1 ]; then
        : "${NODE_RANK:?set NODE_RANK to 0 .. $((nodes - 1)), another on each node}" "${MASTER_PORT:=29500}"
        require_number NODE_RANK 0 && require_number MASTER_PORT 1 || return
        where=(
            --nnodes "$nodes"
            --node-rank "$NODE_RANK"
            --master-addr "${MASTER_ADDR:?set MASTER_ADDR to the name of the first node}"
            --master-port "$MASTER_PORT"
        )
    fi
    # torchrun with the same arguments does the same; launch keeps its pages out of a user's one-line mistake
    "$VENV_PYTHON" -m megatron_sead.launch "${where[@]}" --nproc-per-node "$NPROC" \
        -m megatron_sead.train --config "$config" "$@"
}
