# shellcheck shell=bash
# Compiler flags and the restart loop; sourced by every launcher: . launch/env.sh
#
# The flags are checked against the compiler by tests/launch/test_flags.py: one that it does not know
# would stop every start.

# TPU, every generation.
ST4VLA_TPU_FLAGS=(
    # Gradients of down_proj and o_proj, sliced along the lanes, are scattered like the others. Without
    # these three they are summed whole on every chip, at twice the bytes.
    --xla_tpu_assign_all_reduce_scatter_layout=true
    --xla_tpu_relayout_group_size_threshold_for_reduce_scatter=1
    --xla_tpu_use_minor_sharding_for_major_trivial_input=true
)

# v4, v5e: the tensor core itself moves the data, in steps that are fused with matmuls.
ST4VLA_TPU_FUSION_FLAGS=(
    # a collective is cut in steps that run beside matmuls
    --xla_tpu_enable_async_collective_fusion=true
    # the same for all-gathers, which FSDP does for each weight, forward and backward
    --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
    # spreads one collective over several matmuls: one is too short to hide a layer's weights
    --xla_tpu_enable_async_collective_fusion_multiple_steps=true
    # lets the tensor core compute while the steps run
    --xla_tpu_overlap_compute_collective_tc=true
    # splits all-gathers in start and done, without which nothing can be put between
    --xla_enable_async_all_gather=true
)

# v5p, v6e: their SparseCores move the data while the tensor core computes; every collective becomes
# asynchronous, reduce-scatters and all-reduces too.
ST4VLA_TPU_SPARSECORE_FLAGS=(
    --xla_tpu_enable_sparse_core_collective_offload_all_gather=true
    --xla_tpu_enable_sparse_core_collective_offload_reduce_scatter=true
    --xla_tpu_enable_sparse_core_collective_offload_all_reduce=true
    # what is fused with matmuls is not given to the SparseCores
    --xla_tpu_enable_async_collective_fusion_fuse_all_gather=false
    # the SparseCores take the tensor core's view of the slice, and work with both of its cores
    --xla_tpu_use_tc_device_shape_on_sc=true
    --xla_sc_disable_megacore_partitioning=true
)

# GPU.
ST4VLA_GPU_FLAGS=(
    # moves collectives off the critical path: weights are gathered while the layer before computes
    --xla_gpu_enable_latency_hiding_scheduler=true
    # gathers and scatters of a layer's small weights go together (bytes; the default is 30 MB)
    --xla_gpu_all_gather_combine_threshold_bytes=134217728
    --xla_gpu_reduce_scatter_combine_threshold_bytes=134217728
)

# Adds this platform's flags before the user's own, which win: set_compiler_flags tpu|gpu|cpu [v5e|...]
# A TPU's generation is found out, if it is not given.
set_compiler_flags() {
    local flags generation
    case $1 in
        tpu)
            generation=${2:-$(detect_generation)}
            case $generation in
                v5p | v6e) flags=("${ST4VLA_TPU_FLAGS[@]}" "${ST4VLA_TPU_SPARSECORE_FLAGS[@]}") ;;
                v4 | v5e) flags=("${ST4VLA_TPU_FLAGS[@]}" "${ST4VLA_TPU_FUSION_FLAGS[@]}") ;;
                *) flags=("${ST4VLA_TPU_FLAGS[@]}") ;;
            esac
            export LIBTPU_INIT_ARGS="${flags[*]}${LIBTPU_INIT_ARGS:+ $LIBTPU_INIT_ARGS}"
            ;;
        gpu) export XLA_FLAGS="${ST4VLA_GPU_FLAGS[*]}${XLA_FLAGS:+ $XLA_FLAGS}" ;;
        cpu) ;;
        *)
            echo "error: platform '$1': need tpu, gpu or cpu" >&2
            return 2
            ;;
    esac
}

# Prints this host's platform: tpu, gpu or cpu.
detect_platform() {
    if [[ -e /dev/accel0 || -e /dev/vfio/0 ]]; then
        echo tpu
    elif [[ -e /dev/nvidiactl ]]; then
        echo gpu
    else
        echo cpu
    fi
}

# Prints the generation of this host's TPU by its PCI identity (as jax does), or nothing.
detect_generation() {
    local device
    for device in "${PCI_DEVICES:-/sys/bus/pci/devices}"/*; do
        [[ $(cat "$device/vendor" 2>/dev/null) == 0x1ae0 ]] || continue
        case $(cat "$device/device" 2>/dev/null) in
            0x005e) echo v4 && return ;;
            0x0062) echo v5p && return ;;
            0x0063) echo v5e && return ;;
            0x006f) echo v6e && return ;;
        esac
    done
}

# Runs a command, and again for as long as it ends with 75 ("saved, start me again") or 137 (killed by
# SIGKILL, as for memory): run_until_done COMMAND. Its last status is returned. SIGTERM and SIGINT are passed on, and then nothing is
# started again: the machine is going away, and whoever sent them decides. Gives up after QUICK_ENDS
# (5) ends in a row that came within QUICK_S (60) seconds of their start.
run_until_done() {
    local status quick=0 start
    child='' stop_requested=''
    trap 'stop_requested=1; [[ -n $child ]] && kill -TERM "$child" 2>/dev/null' TERM INT
    while true; do
        start=$SECONDS
        "$@" &
        child=$!
        # wait returns early when a trap runs
        while true; do
            status=0
            wait "$child" || status=$?
            kill -0 "$child" 2>/dev/null || break
        done
        child=''
        if [[ ($status -ne 75 && $status -ne 137) || -n $stop_requested ]]; then
            break
        fi
        if ((SECONDS - start < ${QUICK_S:-60})); then
            quick=$((quick + 1))
        else
            quick=0
        fi
        if ((quick >= ${QUICK_ENDS:-5})); then
            echo "error: ended $quick times in a row within ${QUICK_S:-60} s of its start; see above" >&2
            break
        fi
        echo "ended with $status at $(date -u +%FT%TZ): starting again in ${RESTART_DELAY_S:-10} s" >&2
        sleep "${RESTART_DELAY_S:-10}"
        [[ -z $stop_requested ]] || break
    done
    trap - TERM INT
    return "$status"
}
